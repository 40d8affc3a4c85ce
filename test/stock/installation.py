"""Where do the environments and our wheel come from? For test/doors too."""

from __future__ import annotations

import pathlib
import sys

import pytest

CHECKOUT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tools"))

import environment  # noqa: E402


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Our wheel, built from this checkout."""
    return environment.built_wheel("engines", CHECKOUT, tmp_path_factory.mktemp("wheel"))


def limit_only_the_test(items: list[pytest.Item], folder: pathlib.Path) -> list[pytest.Item]:
    """Let the time limit of the tests in a folder count the test alone: making an environment has its own deadline.

    Returns those tests.
    """
    here = [item for item in items if folder in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.timeout(120, func_only=True))
    return here
