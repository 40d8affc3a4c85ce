"""What do the tests of the docs share with others?"""

from __future__ import annotations

import pathlib
import sys

import pytest

for folder in ("stock", "doors", "faults"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

from installation import limit_only_the_test, wheel  # noqa: E402, F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit_only_the_test(items, pathlib.Path(__file__).parent)
