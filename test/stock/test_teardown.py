"""What happens to the probe when a manager is torn down and another takes its place in the same process?

Releases from 0.5.21 on have teardown() and the switch between the roles.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator

import pytest
from kit.stock_node import ENABLE, Start, StockNode, counts, is_blacklisted, is_served, recovers

pytestmark = pytest.mark.every_release

JOIN_S = 3.0  # so long SGLang's own teardown() waits for a thread
UNTIL_A_PROBE_HANGS_S = 0.3


@pytest.fixture(scope="module")
def prefill(start: Start, decode: StockNode, connectors: pathlib.Path) -> StockNode:
    """A prefill node with the switch on, which decode has registered with."""
    if "def teardown(" not in (connectors / "mooncake" / "conn.py").read_text():
        pytest.skip("this release has no teardown()")
    node = start("prefill", **{ENABLE: "1"}).make()
    decode.make()
    assert is_served(node, decode)
    return node


@pytest.fixture
def hung_decode(prefill: StockNode, decode: StockNode) -> Iterator[StockNode]:
    """The decode node, stopped, with a probe of ours out that hangs until it goes on."""
    decode.stop()
    try:
        prefill.ask("blacklist", session=decode.session)
        time.sleep(UNTIL_A_PROBE_HANGS_S)
        yield decode
    finally:
        decode.resume()


def test_teardown_ends_the_probe_thread_at_once_even_while_a_probe_hangs(
    prefill: StockNode, hung_decode: StockNode
) -> None:
    torn_down = prefill.ask("teardown")
    (took_s,) = torn_down["loops_s"]
    assert took_s < JOIN_S
    assert prefill.ask("state")["probe_loops"] == []


def test_the_next_prefill_manager_has_one_probe_thread_and_recovers(prefill: StockNode, decode: StockNode) -> None:
    prefill.make()
    assert len(prefill.ask("state")["probe_loops"]) == 1
    assert is_served(prefill, decode, register=True)
    before = prefill.ask("counter")["value"]
    prefill.ask("blacklist", session=decode.session)
    assert recovers(prefill, decode.session)
    assert counts(prefill, before + 1)
    assert is_served(prefill, decode)


def test_a_manager_that_was_torn_down_probes_no_more(prefill: StockNode, decode: StockNode) -> None:
    prefill.ask("teardown")
    prefill.ask("blacklist", session=decode.session)
    time.sleep(2.0)  # a running probe would have let it in after SETTLE, a second
    assert is_blacklisted(prefill, decode.session)


def test_after_a_switch_to_the_decode_role_no_probe_thread_runs(prefill: StockNode) -> None:
    prefill.make(role="decode")
    assert prefill.ask("state")["probe_loops"] == []
    prefill.ask("teardown")


def test_after_a_switch_back_to_prefill_it_recovers_again(prefill: StockNode, decode: StockNode) -> None:
    prefill.make(role="prefill")
    assert len(prefill.ask("state")["probe_loops"]) == 1
    assert is_served(prefill, decode, register=True)
    prefill.ask("blacklist", session=decode.session)
    assert recovers(prefill, decode.session)


def test_the_interpreter_exits_cleanly_while_a_probe_hangs(prefill: StockNode, hung_decode: StockNode) -> None:
    assert prefill.exit(deadline_s=20) == 0
