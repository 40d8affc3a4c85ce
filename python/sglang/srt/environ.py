"""Which settings has the failed-session probe, and are the values in the environment allowed?

Beside SGLang this file runs at the end of SGLang's own ``sglang.srt.environ``; alone it is that module.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import TYPE_CHECKING

from sglang_failed_session_probe import OFF_WORDS as _PROBE_OFF_WORDS
from sglang_failed_session_probe import ON_WORDS as _PROBE_ON_WORDS
from sglang_failed_session_probe import SWITCH as _PROBE_SWITCH
from sglang_failed_session_probe.printable import printable_repr as _probe_printable_repr

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_PROBE_INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
_PROBE_MAX_INTERVAL = "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S"
# float() and int() take more than an operator can mean: 1_0, digits of any script, signs.
_PROBE_SECONDS = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_PROBE_COUNT = re.compile(r"0*([1-9][0-9]{0,4})")
# The number of sessions is divided by this.
_PROBE_LEAST_S = 1e-300
_PROBE_MOST = 10_000


def _probe_setting(variable: str, default: Any, zero_allowed: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"variable": variable, "zero_allowed": zero_allowed})


@dataclasses.dataclass(frozen=True)
class FailedSessionProbeSettings:
    """The settings in force; durations are in seconds. Immutable, so any thread may read them."""

    enabled: bool = _probe_setting(_PROBE_SWITCH, False)
    interval_s: float = _probe_setting(_PROBE_INTERVAL, 30.0)
    max_interval_s: float = _probe_setting(_PROBE_MAX_INTERVAL, 300.0)
    idle_timeout_s: float = _probe_setting("SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S", 600.0)
    settle_s: float = _probe_setting("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", 1.0, zero_allowed=True)
    verify: bool = _probe_setting("SGLANG_FAILED_SESSION_PROBE_VERIFY", True)
    concurrency: int = _probe_setting("SGLANG_FAILED_SESSION_PROBE_CONCURRENCY", 16)

    @classmethod
    def by_variable(cls) -> dict[str, dataclasses.Field[Any]]:
        """The fields by the environment variable that each is read from."""
        return {field.metadata["variable"]: field for field in dataclasses.fields(cls)}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> FailedSessionProbeSettings:
        """Reads and checks every setting. An empty value counts as unset.

        Raises ValueError with one sentence that names the variable, its value and what is allowed.
        """
        settings = cls(**{field.name: cls.read(field, environment) for field in dataclasses.fields(cls)})
        if settings.interval_s > settings.max_interval_s:
            raise ValueError(
                f"{_PROBE_INTERVAL}={settings.interval_s:.15g} is not allowed: "
                f"it must not be greater than {_PROBE_MAX_INTERVAL}={settings.max_interval_s:.15g}."
            )
        return settings

    @staticmethod
    def read(field: dataclasses.Field[Any], environment: Mapping[str, str]) -> Any:
        """Reads and checks one of the settings; raises as ``from_environment``."""
        variable = field.metadata["variable"]
        value = environment.get(variable, "").strip()
        if not value:
            return field.default
        if isinstance(field.default, bool):
            return _probe_flag(variable, value)
        if isinstance(field.default, int):
            return _probe_count(variable, value)
        return _probe_seconds(variable, value, field.metadata["zero_allowed"])

    def __str__(self) -> str:
        return (
            f"interval={self.interval_s:g}s max_interval={self.max_interval_s:g}s "
            f"idle_timeout={self.idle_timeout_s:g}s settle={self.settle_s:g}s "
            f"verify={'on' if self.verify else 'off'} concurrency={self.concurrency}"
        )


def _probe_setting_refused(variable: str, value: str, allowed: str) -> ValueError:
    return ValueError(f"{variable}={_probe_printable_repr(value)} is not allowed: set it to {allowed}, or unset it.")


def _probe_flag(variable: str, value: str) -> bool:
    if value.lower() in (*_PROBE_ON_WORDS, *_PROBE_OFF_WORDS):
        return value.lower() in _PROBE_ON_WORDS
    allowed = f"one of {'/'.join(_PROBE_ON_WORDS)} or {'/'.join(_PROBE_OFF_WORDS)}"
    raise _probe_setting_refused(variable, value, allowed)


def _probe_seconds(variable: str, value: str, zero_allowed: bool) -> float:
    seconds = float(value) if _PROBE_SECONDS.fullmatch(value) else math.nan
    if (0 if zero_allowed else _PROBE_LEAST_S) <= seconds < math.inf:
        return seconds
    least = f", {_PROBE_LEAST_S:g} at least" if 0 < seconds < _PROBE_LEAST_S else ", such as 2.5"
    bound = "of 0 or more" if zero_allowed else "greater than 0"
    raise _probe_setting_refused(variable, value, f"a finite number of seconds {bound}{least}")


def _probe_count(variable: str, value: str) -> int:
    digits = _PROBE_COUNT.fullmatch(value)
    if digits and int(digits[1]) <= _PROBE_MOST:
        return int(digits[1])
    raise _probe_setting_refused(variable, value, f"a whole number greater than 0, {_PROBE_MOST} at most")


def patch_failed_session_probe(patch: Any, sglang: dict[str, Any]) -> None:
    """Makes the settings fields of SGLang's ``envs``, where the release has ``envs`` and not these fields.

    ``patch.replace(owner, name, value)`` sets an attribute so that it can be undone; ``sglang`` is the namespace of
    SGLang's module. Runs in the thread that imports SGLang's module.
    """
    owner = sglang.get("Envs")
    if owner is None:
        return
    types = {bool: "EnvBool", float: "EnvFloat", int: "EnvInt"}
    for variable, ours in FailedSessionProbeSettings.by_variable().items():
        if not hasattr(owner, variable):
            field = sglang[types[type(ours.default)]](ours.default)
            field.name = variable  # a field that is assigned outside the class body does not learn its name
            patch.replace(owner, variable, field)
