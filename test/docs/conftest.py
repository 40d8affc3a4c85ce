"""What do the tests of the docs share with others?"""

from __future__ import annotations

import pathlib

import pytest
from kit.releases import limit_only_the_test, wheel  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
