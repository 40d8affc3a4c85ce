"""What does an operator see whose Mooncake cannot probe?"""

from __future__ import annotations

import pathlib
import time

import pytest
from kit.releases import environment
from kit.stock_node import ENABLE, Start, StockNode, is_blacklisted

pytestmark = pytest.mark.parametrize("release", ["0.5.12.post1", "0.5.23"], indirect=True, scope="session")

INSTALLED = "0.3.10.post2"
NEEDED = "0.3.11"
SEVERAL_PROBES_S = 2.0


@pytest.fixture(scope="module")
def prefill(start: Start, release: str, wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> StockNode:
    """A prefill node with the switch on, on a Mooncake without send_probe."""
    folder = tmp_path_factory.mktemp("old-mooncake") / "venv"
    python = environment.with_wheel(f"sglang-{release}+{INSTALLED}", wheel, folder)
    return start("prefill", python=python, **{ENABLE: "1"}).make()


def test_one_warning_names_the_installed_and_the_needed_version(prefill: StockNode) -> None:
    (warning,) = prefill.records(level="WARNING")
    assert INSTALLED in warning
    assert NEEDED in warning


def test_one_line_more_is_said_of_a_session_that_stays_blacklisted(prefill: StockNode) -> None:
    prefill.wait_for_record("Starting failed-session probe loop")
    before = prefill.records()
    prefill.ask("blacklist", session="127.0.0.1:1")
    prefill.wait_for_record("127.0.0.1:1 is blacklisted")
    time.sleep(SEVERAL_PROBES_S)
    assert is_blacklisted(prefill, "127.0.0.1:1")
    (more,) = prefill.records()[len(before) :]
    assert "127.0.0.1:1 is blacklisted" in more
    assert "stays out until it registers again" in more
