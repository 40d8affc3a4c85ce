"""How does hypothesis try things out in these tests, and how is a piece of Python run in a process of its own?"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

PYTHON_FOLDER = pathlib.Path(__file__).resolve().parents[2] / "python"

settings.register_profile("unit", deadline=None, database=None, derandomize=True)
settings.load_profile("unit")


@pytest.fixture
def run_python(tmp_path: pathlib.Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script with our files and those in ``tmp_path`` on the path, and the given environment variables."""

    def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PYTHON_FOLDER)])}
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**inherited, **paths, **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run
