"""In which environments are the doors tried?"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "stock"))

from installation import limit_only_the_test, wheel  # noqa: F401
from places import Place, place


@pytest.fixture(scope="session")
def place_with(
    wheel: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Place]:
    """Gives the environment NAME with our package from a "wheel" or "editable", SGLang lying as places.py says."""

    @functools.cache
    def place_with(name: str, package: str, sglang: str = "installed") -> Place:
        return place(name, wheel if package == "wheel" else None, sglang, tmp_path_factory.mktemp("place"))

    return place_with


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
