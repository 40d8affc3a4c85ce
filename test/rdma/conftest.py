"""What do the tests in this folder share: two machines with RDMA, and a report of what faults between them cost?"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator

import machines
import pytest
from machines import Pair
from trial import Contender, Trial

REPORT = os.environ.get("RDMA_REPORT")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "in_full: played by `make rdma` alone, which sets RDMA_REPORT")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not REPORT:
        left_out = [item for item in items if item.get_closest_marker("in_full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two machines with an RDMA device each; the test is skipped where there can be none."""
    yield from _pair(devices=1)


@pytest.fixture(scope="module")
def pair_of_two_devices() -> Iterator[Pair]:
    """Two machines with two RDMA devices each."""
    yield from _pair(devices=2)


@pytest.fixture
def pair_beside_another() -> Iterator[Pair]:
    """As ``pair_of_two_devices``, and a third machine."""
    yield from _pair(devices=2, another=True)


def _pair(devices: int, another: bool = False) -> Iterator[Pair]:
    try:
        machines.image()
    except machines.environment.CannotMake as why:
        pytest.skip(f"NO FAULT OVER RDMA IS INJECTED: {why}")
    with machines.pair(devices, another) as pair:
        yield pair


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Appends a trial to the file that RDMA_REPORT names, for tools/rdma_table.py, and what was logged to a file of its
    own in the folder that RDMA_LOGS names.
    """

    def record(fault: str, contender: Contender, timeout_s: int, trial: Trial, devices: int = 1) -> None:
        line = {
            "fault": fault,
            "timeout_s": timeout_s,
            "contender": contender.name,
            "devices": devices,
            "sessions": [dataclasses.asdict(session) for session in trial.sessions],
        }
        if REPORT:
            with open(REPORT, "a") as file:
                file.write(json.dumps(line) + "\n")
        if logs := os.environ.get("RDMA_LOGS"):
            pathlib.Path(logs).mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", request.node.name)
            pathlib.Path(logs, f"{name}.log").write_text(f"{trial}\n\n{trial.mooncake}")

    return record
