"""Which versions of Mooncake meet, and where is written what was seen of each pair?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest
from kit.network import Network, why_no_network
from kit.releases import environment, limit_only_the_test, wheel  # noqa: F401
from kit.stock_node import ENABLE, StockNode
from version_pairs import VERSIONS, Pair, Seen, play

Nodes = dict[str, StockNode]


@pytest.fixture(scope="session")
def pythons(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Stock SGLang with our wheel and, each in an environment of its own, a version of Mooncake."""
    newest = f"sglang-{environment.SHARED_RELEASE}"
    names = {v: newest if v == environment.MOONCAKE_VERSION else f"{newest}+{v}" for v in VERSIONS}
    return {v: environment.with_wheel(name, wheel, tmp_path_factory.mktemp(v) / "venv") for v, name in names.items()}


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if why_not := why_no_network():
        pytest.skip(f"no network fault is injected: {why_not}")
    with Network() as network:
        yield network


@pytest.fixture(scope="session")
def nodes(
    pythons: dict[str, pathlib.Path], network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Nodes, Nodes]]:
    """A prefill and a decode node of each version."""
    with contextlib.ExitStack() as running:

        def start(role: str, **settings: str) -> Nodes:
            folders = {version: tmp_path_factory.mktemp(role) for version in pythons}
            return {
                version: running.enter_context(StockNode(python, role, folders[version], network.path, **settings))
                for version, python in pythons.items()
            }

        prefills, decodes = start("prefill", **{ENABLE: "1"}), start("decode")
        for node in (*prefills.values(), *decodes.values()):
            node.make()
        yield prefills, decodes


@pytest.fixture(scope="session")
def see(nodes: tuple[Nodes, Nodes], network: Network) -> Callable[[str, str], Seen]:
    """What is seen of a pair of versions. All pairs of a decode version are played when the first is asked for."""
    prefills, decodes = nodes
    played: dict[tuple[str, str], Seen] = {}

    def see(prefill: str, decode: str) -> Seen:
        if (prefill, decode) not in played:
            pairs = [Pair(version, decode, node, decodes[decode]) for version, node in prefills.items()]
            play(pairs, network)
            for pair in pairs:
                played[pair.prefill_version, decode] = pair.seen
                report(pair)
        return played[prefill, decode]

    return see


def report(pair: Pair) -> None:
    """Adds a line to the file MOONCAKE_REPORT, if there is to be one."""
    if file := os.environ.get("MOONCAKE_REPORT"):
        versions = {"prefill": pair.prefill_version, "decode": pair.decode_version}
        with open(file, "a") as lines:
            lines.write(json.dumps({**versions, **dataclasses.asdict(pair.seen)}) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
