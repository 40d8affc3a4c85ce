"""Which settings has the failed-session probe, and are the values in the environment allowed?

Beside SGLang this file runs at the end of SGLang's own ``sglang.srt.environ``; alone it is that module.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import TYPE_CHECKING

from sglang_failed_session_probe.printable import printable_repr as _probe_printable_repr

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_PROBE_ENABLE = "SGLANG_ENABLE_FAILED_SESSION_PROBE"
_PROBE_INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
_PROBE_MAX_INTERVAL = "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S"
_PROBE_IDLE_TIMEOUT = "SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S"
_PROBE_SETTLE = "SGLANG_FAILED_SESSION_PROBE_SETTLE_S"
_PROBE_VERIFY = "SGLANG_FAILED_SESSION_PROBE_VERIFY"
_PROBE_CONCURRENCY = "SGLANG_FAILED_SESSION_PROBE_CONCURRENCY"

_PROBE_TRUE_WORDS = ("true", "1", "yes", "y", "on")
_PROBE_FALSE_WORDS = ("false", "0", "no", "n", "off")
# float() and int() take more than an operator can mean: 1_0, digits of any script, signs.
_PROBE_SECONDS = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_PROBE_COUNT = re.compile(r"0*([1-9][0-9]{0,4})")
# What a thousand sessions are divided by must leave a number.
_PROBE_LEAST_S = 1e-300
_PROBE_MOST = 10_000


@dataclasses.dataclass(frozen=True)
class FailedSessionProbeSettings:
    """The settings in force; durations are in seconds. Immutable, so any thread may read them."""

    enabled: bool = False
    interval_s: float = 30.0
    max_interval_s: float = 300.0
    idle_timeout_s: float = 600.0
    settle_s: float = 1.0
    verify: bool = True
    concurrency: int = 16

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> FailedSessionProbeSettings:
        """Reads and checks every setting. An empty value counts as unset.

        Raises ValueError with one sentence that names the variable, its value and what is allowed.
        """
        settings = cls(
            enabled=_probe_flag(environment, _PROBE_ENABLE, cls.enabled),
            interval_s=_probe_seconds(environment, _PROBE_INTERVAL, cls.interval_s),
            max_interval_s=_probe_seconds(environment, _PROBE_MAX_INTERVAL, cls.max_interval_s),
            idle_timeout_s=_probe_seconds(environment, _PROBE_IDLE_TIMEOUT, cls.idle_timeout_s),
            settle_s=_probe_seconds(environment, _PROBE_SETTLE, cls.settle_s, zero_allowed=True),
            verify=_probe_flag(environment, _PROBE_VERIFY, cls.verify),
            concurrency=_probe_count(environment, _PROBE_CONCURRENCY, cls.concurrency),
        )
        if settings.interval_s > settings.max_interval_s:
            raise ValueError(
                f"{_PROBE_INTERVAL}={settings.interval_s:.15g} is not allowed: "
                f"it must not be greater than {_PROBE_MAX_INTERVAL}={settings.max_interval_s:.15g}."
            )
        return settings

    def __str__(self) -> str:
        return (
            f"interval={self.interval_s:g}s max_interval={self.max_interval_s:g}s "
            f"idle_timeout={self.idle_timeout_s:g}s settle={self.settle_s:g}s "
            f"verify={'on' if self.verify else 'off'} concurrency={self.concurrency}"
        )


def _probe_setting_refused(name: str, value: str, allowed: str) -> ValueError:
    return ValueError(f"{name}={_probe_printable_repr(value)} is not allowed: set it to {allowed}, or unset it.")


def _probe_flag(environment: Mapping[str, str], name: str, default: bool) -> bool:
    value = environment.get(name, "").strip()
    if not value:
        return default
    if value.lower() in _PROBE_TRUE_WORDS:
        return True
    if value.lower() in _PROBE_FALSE_WORDS:
        return False
    raise _probe_setting_refused(name, value, f"one of {'/'.join(_PROBE_TRUE_WORDS)} or {'/'.join(_PROBE_FALSE_WORDS)}")


def _probe_seconds(environment: Mapping[str, str], name: str, default: float, zero_allowed: bool = False) -> float:
    value = environment.get(name, "").strip()
    if not value:
        return default
    seconds = float(value) if _PROBE_SECONDS.fullmatch(value) else math.nan
    if (0 if zero_allowed else _PROBE_LEAST_S) <= seconds < math.inf:
        return seconds
    least = f", {_PROBE_LEAST_S:g} at least" if 0 < seconds < _PROBE_LEAST_S else ", such as 2.5"
    raise _probe_setting_refused(
        name, value, f"a finite number of seconds {'of 0 or more' if zero_allowed else 'greater than 0'}{least}"
    )


def _probe_count(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "").strip()
    if not value:
        return default
    digits = _PROBE_COUNT.fullmatch(value)
    if digits and int(digits[1]) <= _PROBE_MOST:
        return int(digits[1])
    raise _probe_setting_refused(name, value, f"a whole number greater than 0, {_PROBE_MOST} at most")


def patch_failed_session_probe(patch: Any, sglang: dict[str, Any]) -> None:
    """Makes the settings fields of SGLang's ``envs``, where the release has it and lacks them.

    ``patch.replace(owner, name, value)`` sets an attribute so that it can be undone; ``sglang`` is the namespace of
    SGLang's module. Runs in the thread that imports SGLang's module.
    """
    owner = sglang.get("Envs")
    if owner is None:
        return
    defaults = FailedSessionProbeSettings()
    for name, field_type, default in (
        (_PROBE_ENABLE, "EnvBool", defaults.enabled),
        (_PROBE_INTERVAL, "EnvFloat", defaults.interval_s),
        (_PROBE_MAX_INTERVAL, "EnvFloat", defaults.max_interval_s),
        (_PROBE_IDLE_TIMEOUT, "EnvFloat", defaults.idle_timeout_s),
        (_PROBE_SETTLE, "EnvFloat", defaults.settle_s),
        (_PROBE_VERIFY, "EnvBool", defaults.verify),
        (_PROBE_CONCURRENCY, "EnvInt", defaults.concurrency),
    ):
        if not hasattr(owner, name):
            field = sglang[field_type](default)
            field.name = name  # assigned from outside the class body, it is not told its name
            patch.replace(owner, name, field)
