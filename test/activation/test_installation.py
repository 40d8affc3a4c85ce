"""What does it cost to have our package installed, and what is left when it is not any more?"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

import pytest
from kit.installations import Installation, install, site_packages
from kit.releases import environment
from sglang_failed_session_probe import SWITCH as ENABLE

HEAVY = "('sglang', 'wrapt', 'prometheus_client', 'mooncake')"
LOADED = f"import sys; print(*sorted(name for name in {HEAVY} if name in sys.modules))"
COST_US = 1000
PACKAGES = ["wheel", "editable"]
OFF = [{}, {ENABLE: "0"}, {ENABLE: "off"}]


def imported(installation: Installation, **variables: str) -> dict[str, int]:
    """What the interpreter imports at its start, with the time that each module takes by itself in microseconds."""
    lines = installation.run("-X", "importtime", "-c", "pass", **variables).stderr.splitlines()
    columns = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    return {name.strip(): int(own) for own, _, name in columns if own.strip().isdigit()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The same environment without our package."""
    folder = tmp_path_factory.mktemp("bare")
    return Installation(environment.in_front_of("engines", folder / "venv"), folder, folder)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("switch", OFF, ids=lambda switch: switch.get(ENABLE, "unset"))
def test_switched_off_the_interpreter_starts_with_nothing_more_than_the_standard_library(
    installed: Callable[..., Installation], bare: Installation, package: str, switch: dict[str, str]
) -> None:
    more = imported(installed("engines", package), **switch).keys() - imported(bare).keys()
    foreign = {name for name in more if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {"sglang_failed_session_probe"}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("switch", OFF, ids=lambda switch: switch.get(ENABLE, "unset"))
def test_switched_off_our_door_costs_less_than_a_millisecond(
    installed: Callable[..., Installation], bare: Installation, package: str, switch: dict[str, str]
) -> None:
    without = imported(bare).keys()
    costs = []
    for _ in range(5):
        times = imported(installed("engines", package), **switch)
        costs.append(sum(own for name, own in times.items() if name not in without))
    assert min(costs) < COST_US, f"microseconds at five starts: {costs}"


@pytest.mark.parametrize("package", PACKAGES)
def test_switched_off_no_module_of_others_is_loaded(installed: Callable[..., Installation], package: str) -> None:
    assert installed("engines", package).run("-c", LOADED).stdout.split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_switched_on_only_wrapt_is_loaded_before_sglang_is(
    installed: Callable[..., Installation], package: str
) -> None:
    assert installed("engines", package).run("-c", LOADED, **{ENABLE: "1"}).stdout.split() == ["wrapt"]


@pytest.mark.parametrize("package", PACKAGES)
def test_uninstalling_leaves_nothing_behind(wheel: pathlib.Path, tmp_path: pathlib.Path, package: str) -> None:
    here = install("engines", wheel if package == "wheel" else None, "installed", tmp_path)
    assert ours_in(here)
    here.pip("uninstall", "--yes", "sglang-failed-session-probe")
    assert ours_in(here) == []


def ours_in(installation: Installation) -> list[pathlib.Path]:
    """Everything in site-packages but what the environment began with and what our package asks for."""
    others = ("00-behind", "editables", "_virtualenv", "distutils-precedence")
    return [entry for entry in site_packages(installation.python).iterdir() if not entry.name.startswith(others)]
