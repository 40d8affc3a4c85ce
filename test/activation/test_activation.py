"""Does each door alone let our package into SGLang, wherever the two lie?"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable

import pytest
from kit.installations import Installation
from kit.releases import RELEASES, environment_with, sglang_folder
from sglang_failed_session_probe import SWITCH

PROCESS = pathlib.Path(__file__).with_name("activation_process.py")
ON = {SWITCH: "1"}


@pytest.mark.parametrize(
    ("release", "package", "sglang", "door"),
    [
        ("0.5.23", "wheel", "installed", ".pth"),
        ("0.5.23", "editable", "installed", ".pth"),
        ("0.5.23", "editable", "installed", "entry point"),
        ("0.5.23", "editable", "by finder", ".pth"),
        ("0.5.23", "editable", "by path", ".pth"),
        ("0.5.23", "wheel", "by finder", "entry point"),
        ("0.5.8.post1", "editable", "installed", ".pth"),
    ],
)
def test_the_probe_is_active_through_either_door(
    installed: Callable[..., Installation], release: str, package: str, sglang: str, door: str
) -> None:
    assert_active(installed(environment_with(release), package, sglang), plugins=door == "entry point")


@pytest.mark.every_release
@pytest.mark.parametrize("release", RELEASES)
def test_where_sglang_has_plugins_the_entry_point_alone_is_enough(
    installed: Callable[..., Installation], release: str
) -> None:
    installation = installed(environment_with(release), "wheel")
    if not (sglang_folder(installation.python) / "srt" / "plugins").is_dir():
        pytest.skip("this release has no plugins")
    assert_active(installation, plugins=True)


def assert_active(installation: Installation, plugins: bool) -> None:
    """Import the connector through one door alone; all that is patched must be our code, in SGLang's own modules."""
    with installation.without_pth_door() if plugins else contextlib.nullcontext():
        found = json.loads(installation.run(PROCESS, "active", *(["plugins"] if plugins else []), **ON).stdout)
    for module in ("sglang", "conn"):
        assert pathlib.Path(found[module]).is_relative_to(installation.sglang), f"{module} is not SGLang's own"
    for method in ("pass", "send_probe"):
        assert pathlib.Path(found[method]).is_relative_to(installation.ours), f"{method} is not ours"
    assert found["knows_our_settings"]


def test_the_engines_module_does_not_bring_the_connector_with_it(installed: Callable[..., Installation]) -> None:
    """SGLang's launcher imports the one before its arguments are there and its metrics have a place; not the other."""
    installation = installed("sglang-0.5.23", "wheel")
    assert json.loads(installation.run(PROCESS, "engine", **ON).stdout) is False


@pytest.fixture(scope="module", params=RELEASES)
def undone(request: pytest.FixtureRequest, installed: Callable[..., Installation]) -> dict[str, list[str]]:
    """What activate() and deactivate() have changed in a process that had imported the stock connector."""
    return json.loads(installed(environment_with(request.param), "wheel").run(PROCESS, "undone").stdout)


@pytest.mark.every_release
def test_running_our_files_in_sglangs_modules_changes_no_global_of_theirs(undone: dict[str, list[str]]) -> None:
    assert undone["globals"] == []


@pytest.mark.every_release
def test_a_second_activation_changes_nothing(undone: dict[str, list[str]]) -> None:
    assert undone["by_a_second_activation"] == []


@pytest.mark.every_release
def test_deactivation_gives_back_every_attribute_of_every_class_and_of_envs(undone: dict[str, list[str]]) -> None:
    assert undone["left_after_deactivation"] == []
    assert undone["lost_after_deactivation"] == []


@pytest.mark.every_release
def test_it_can_be_activated_and_deactivated_again(undone: dict[str, list[str]]) -> None:
    assert undone["missing_after_reactivation"] == []
    assert undone["left_at_the_end"] == []
