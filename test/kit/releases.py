"""Which releases are tested, and where do their environments and our wheel come from?"""

from __future__ import annotations

import os
import pathlib
import subprocess

import environment
import pytest

from kit.paths import CHECKOUT

# From the oldest that has the blacklist to the newest; `make matrix` takes more.
RELEASES = os.environ.get("SGLANG_RELEASES", "0.4.10.post2 0.5.2 0.5.8.post1 0.5.12.post1 0.5.23").split()
MOONCAKE = os.environ.get("MOONCAKE_RELEASE", environment.MOONCAKE_VERSION)


def environment_with(release: str) -> str:
    """The name of the environment with that release of SGLang, and with the Mooncake of MOONCAKE_RELEASE."""
    return f"sglang-{release}" if MOONCAKE == environment.MOONCAKE_VERSION else f"sglang-{release}+{MOONCAKE}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Our wheel, built from this checkout."""
    return environment.built_wheel("engines", CHECKOUT, tmp_path_factory.mktemp("wheel"))


def sglang_folder(python: pathlib.Path) -> pathlib.Path:
    """Where the SGLang lies that `python` finds."""
    find = "import importlib.util; print(*importlib.util.find_spec('sglang').submodule_search_locations)"
    found = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True, timeout=60).stdout
    return pathlib.Path(found.strip())


def limit_only_the_test(items: list[pytest.Item], folder: pathlib.Path) -> list[pytest.Item]:
    """Let the time limit of the tests in a folder count the test alone: making an environment has its own deadline.

    Returns those tests.
    """
    here = [item for item in items if folder in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.timeout(120, func_only=True))
    return here
