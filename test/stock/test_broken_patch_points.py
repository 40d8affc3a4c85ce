"""What happens on a build of SGLang that lacks something the patch needs?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit import changed_sglang
from kit.stock_node import ENABLE, Start, StockNode, is_served, recovers

Prefill = Callable[[str], StockNode]

CASES = {
    "0.5.8.post1": ["blacklist renamed", "blacklist is a dict", "blacklist has a second name"],
    "0.5.12.post1": ["lock renamed", "engine's class renamed"],
    "0.5.23": [
        "blacklist renamed",
        "blacklist is a dict",
        "blacklist has a second name",
        "lock renamed",
        "manager's class renamed",
        "engine's class renamed",
    ],
}
NATIVE = {"SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1"}
pytestmark = pytest.mark.parametrize(
    ("release", "build"),
    [(release, build) for release in CASES for build in CASES[release]],
    indirect=["release"],
    scope="session",
)


@pytest.fixture(scope="module")
def prefill(
    start: Start, release: str, python: object, decode: StockNode, tmp_path_factory: pytest.TempPathFactory
) -> Prefill:
    """Gives the prefill node, its switch on, that runs a build."""
    nodes = {}
    for build in CASES[release]:
        path = changed_sglang.make(changed_sglang.BUILDS[build], python, tmp_path_factory.mktemp("changed"))
        nodes[build] = start("prefill", PYTHONPATH=str(path), **NATIVE, **{ENABLE: "1"})
    decode.make()
    for build, node in nodes.items():
        node.ask("call", **changed_sglang.BUILDS[build].names)
        node.make()
    return nodes.__getitem__


def test_one_error_line_names_what_is_missing_and_the_release(prefill: Prefill, build: str, release: str) -> None:
    (error,) = prefill(build).records(level="ERROR")
    assert changed_sglang.BUILDS[build].missing in error
    assert release in error


def test_sglang_is_left_unpatched(prefill: Prefill, build: str) -> None:
    assert prefill(build).ask("code")["foreign_methods"] == []


def test_the_manager_serves_requests_all_the_same(prefill: Prefill, decode: StockNode, build: str) -> None:
    assert is_served(prefill(build), decode, register=True)


def test_only_the_native_probe_runs_where_there_is_one_and_it_heals(
    prefill: Prefill, decode: StockNode, build: str, release: str
) -> None:
    node = prefill(build)
    native = release == "0.5.23"
    assert len(node.ask("state")["probe_loops"]) == native
    if native:
        node.ask("blacklist", session=decode.session)
        assert recovers(node, decode.session)
