"""In which environments are the commands tried?"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
from kit.network_fixture import network  # noqa: F401
from kit.releases import environment, limit_only_the_test, wheel  # noqa: F401
from small_environments import Environment, make


@pytest.fixture
def made(tmp_path: pathlib.Path, wheel: pathlib.Path) -> Callable[..., Environment]:
    """Makes an environment with our wheel and these packages."""
    return lambda *packages, **options: make(tmp_path, wheel, *packages, **options)


@pytest.fixture(scope="session")
def sound(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """SGLang 0.5.23 and our wheel, both really installed."""
    return Environment(environment.with_wheel("sglang-0.5.23", wheel, tmp_path_factory.mktemp("sound") / "venv"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
