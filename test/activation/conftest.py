"""In which environments are the doors tried?"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import pytest
from kit.installations import Installation, install
from kit.releases import limit_only_the_test, wheel  # noqa: F401


@pytest.fixture(scope="session")
def installed(
    wheel: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Installation]:
    """Gives the environment NAME with our package from a "wheel" or "editable", SGLang lying as `install` says."""

    @functools.cache
    def installed(name: str, package: str, sglang: str = "installed") -> Installation:
        return install(name, wheel if package == "wheel" else None, sglang, tmp_path_factory.mktemp("installed"))

    return installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
