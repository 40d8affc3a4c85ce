"""Is what `make dist` builds fit to be released?"""

from __future__ import annotations

import pathlib
import subprocess

import pytest
from kit.releases import CHECKOUT, environment

DEADLINE_S = 400


@pytest.mark.timeout(DEADLINE_S + 20)
def test_sdist_and_wheel_install_into_an_empty_environment_with_both_doors_open(tmp_path: pathlib.Path) -> None:
    environment.python("dist")
    done = subprocess.run(
        ["make", "dist", f"DIST={tmp_path}"], cwd=CHECKOUT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("installs into an empty environment, both doors are open") == 2
    assert len(list(tmp_path.iterdir())) == 2
