"""What do these tests need: Prometheus and promtool, a network of their own, and nodes as in test/faults."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import pytest

CHECKOUT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT / folder) for folder in ("test/faults", "test/stock", "tools")]

import prometheus  # noqa: E402
from installation import environment, limit_only_the_test  # noqa: E402
from network import Network, why_no_network  # noqa: E402


@pytest.fixture(scope="session")
def programs() -> pathlib.Path:
    """The folder with ``prometheus`` and ``promtool``; the test is skipped where they cannot be had."""
    try:
        return prometheus.folder()
    except environment.CannotMake as error:
        pytest.skip(f"no rule is tested: {error}")


@pytest.fixture
def network() -> Iterator[Network]:
    """A network namespace of the test's own; the test is skipped where there can be none."""
    if why_not := why_no_network():
        pytest.skip(f"no fleet is scraped: {why_not}")
    with Network() as network:
        yield network


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
