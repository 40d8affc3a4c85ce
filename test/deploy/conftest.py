"""What do these tests need: Prometheus and promtool, a network of their own, and nodes as in test/faults."""

from __future__ import annotations

import pathlib

import prometheus
import pytest
from kit.network_fixture import network  # noqa: F401
from kit.releases import environment, limit_only_the_test


@pytest.fixture(scope="session")
def programs() -> pathlib.Path:
    """The folder with ``prometheus`` and ``promtool``; the test is skipped where they cannot be had."""
    try:
        return prometheus.folder()
    except environment.CannotMake as error:
        pytest.skip(f"no rule is tested: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
