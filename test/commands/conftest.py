"""In which environments are the commands tried?"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "stock"))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "doors"))

from environments import Environment, make
from installation import environment, limit_only_the_test, wheel  # noqa: F401


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
