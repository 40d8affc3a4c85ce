"""Which releases of SGLang do these tests run on, and who starts and ends their processes?"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Optional

import pytest
from kit.releases import RELEASES, environment, environment_with, limit_only_the_test, sglang_folder, wheel  # noqa: F401
from kit.stock_node import ENABLE, Start, StockNode


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """A stock release of SGLang."""
    return request.param


@pytest.fixture(scope="session")
def python(release: str, wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The python of an environment with that release and our wheel, both really installed."""
    return environment.with_wheel(environment_with(release), wheel, tmp_path_factory.mktemp(release) / "venv")


@pytest.fixture(scope="session")
def connectors(python: pathlib.Path) -> pathlib.Path:
    """The folder with SGLang's connectors in that release."""
    return sglang_folder(python) / "srt" / "disaggregation"


@pytest.fixture(scope="module")
def start(python: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts nodes that live until the module is through.

    Start all nodes of a module before the first of them is used: their imports, a dozen seconds, then overlap.
    """
    with contextlib.ExitStack() as nodes:

        def start(
            role: str, *, python: pathlib.Path = python, network: Optional[str] = None, **settings: str
        ) -> StockNode:
            return nodes.enter_context(StockNode(python, role, tmp_path_factory.mktemp(role), network, **settings))

        yield start


@pytest.fixture(scope="session")
def decode(python: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockNode]:
    """The decode node of that release, with the switch on as an operator may have it. It serves every prefill.

    It has no manager until make() is called; a further call makes another one.
    """
    with StockNode(python, "decode", tmp_path_factory.mktemp("decode"), **{ENABLE: "1"}) as node:
        yield node


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Play one release through before the next begins, each file from top to bottom: nodes start once for all of it."""
    here = limit_only_the_test(items, pathlib.Path(__file__).parent)
    in_order = iter(sorted(here, key=lambda item: (release_of(item), item.path, item.location[1])))
    items[:] = [next(in_order) if item in here else item for item in items]


def release_of(item: pytest.Item) -> str:
    return str(item.callspec.params["release"])  # type: ignore[attr-defined]
