"""Do the two machines end with the test run, however that ends?"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import machines
import pytest
from kit import processes

BOOTS_TWO_MACHINES = "import machines\nwith machines.pair(): pass"


def machines_of(pid: int) -> list[int]:
    """The virtual machines that a process runs."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(child): pathlib.Path(f"/proc/{child}/comm").read_text() for child in children}
    return [child for child, name in names.items() if name.startswith("qemu")]


def test_machines_end_when_the_test_run_is_killed() -> None:
    try:
        machines.image()
    except machines.environment.CannotMake as why:
        pytest.skip(f"NO MACHINE WITH RDMA IS STARTED: {why}")
    test_run = subprocess.Popen(
        [sys.executable, "-c", BOOTS_TWO_MACHINES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=machines.HERE,
    )
    try:
        deadline = time.monotonic() + 100  # other machines may have to end first
        while len(running := machines_of(test_run.pid)) < 2:
            assert test_run.poll() is None, "no machines could be started"
            assert time.monotonic() < deadline, "no machines were started"
            time.sleep(0.05)
    finally:
        test_run.kill()
        test_run.wait()
    deadline = time.monotonic() + 10
    while left := processes.living(running):
        assert time.monotonic() < deadline, f"machines outlive the test run that started them: {left}"
        time.sleep(0.05)
