"""Are decode nodes used again over RDMA when their fault is over, if each machine has two devices? And do those that
cannot be reached any harm to others?
"""

from __future__ import annotations

import statistics
import time

import pytest
from machines import RDMA, Pair
from remote_node import RemoteNode
from test_rdma import DEVICE_RESTS_S, GIVEN_UP_S, SERVED_WITHIN_S, Record, check
from trial import BEFORE, LIMIT, REQUEST_EVERY_S, THIS_PATCH, Contender, nodes, play

pytestmark = [pytest.mark.timeout(1200), pytest.mark.in_full]
SMALL = 4096  # eight sessions' requests are to leave the emulated processors time
LOOKED_AT_BEFORE_S = 20.0
FIRST_FAIL_WITHIN_S = 20.0


@pytest.mark.parametrize(
    ("contender", "sessions"), [(THIS_PATCH, 2), (THIS_PATCH, 8), (LIMIT, 2), (LIMIT, 8), (BEFORE, 2)], ids=str
)
def test_decode_nodes_are_used_again_whose_packets_were_dropped_on_both_devices(
    pair_of_two_devices: Pair, contender: Contender, sessions: int, record: Record
) -> None:
    pair = pair_of_two_devices
    with nodes(pair, contender, sessions) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(*pair.rdma), 60, 2 * GIVEN_UP_S, SMALL)
    record("packets dropped, 60 s", contender, 5, trial, devices=2)
    if contender is THIS_PATCH:
        check(trial)


@pytest.mark.parametrize("contender", [THIS_PATCH, LIMIT], ids=str)
def test_decode_nodes_are_used_again_whose_packets_were_dropped_on_one_device(
    pair_of_two_devices: Pair, contender: Contender, record: Record
) -> None:
    pair = pair_of_two_devices
    with nodes(pair, contender, sessions=2) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(RDMA[0]), 60, 2 * GIVEN_UP_S, SMALL)
    record("packets dropped on one device, 60 s", contender, 5, trial, devices=2)
    if contender is THIS_PATCH:
        check(trial)


def test_decode_nodes_are_used_again_when_a_cable_of_one_device_was_out(
    pair_of_two_devices: Pair, record: Record
) -> None:
    pair = pair_of_two_devices
    with nodes(pair, sessions=2) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.decode.unplugged(RDMA[0]), 20, 2 * GIVEN_UP_S, SMALL)
    record("cable of one device out on the decode's side, 20 s", THIS_PATCH, 5, trial, devices=2)
    check(trial, DEVICE_RESTS_S + SERVED_WITHIN_S)


@pytest.mark.parametrize(("seconds", "beside_traffic"), [(600, False), (120, True)])
def test_decode_nodes_that_cannot_be_reached_do_no_harm_to_another(
    pair_beside_another: Pair, seconds: float, beside_traffic: bool
) -> None:
    pair = pair_beside_another
    assert pair.other_decode is not None
    with nodes(pair, sessions=8) as (prefill, decodes), RemoteNode(pair.other_decode, "other", "decode") as other:
        prefill.register(other)
        assert prefill.send_to(other, SMALL) == "", "a transfer between healthy nodes has failed"
        if beside_traffic:
            prefill.ask("request", [other.session], SMALL, REQUEST_EVERY_S)
            time.sleep(LOOKED_AT_BEFORE_S)
        prefill.ask("request", [decode.session for decode in decodes], SMALL, REQUEST_EVERY_S)
        with pair.dropped(*pair.rdma):
            # What the first failed transfers do to others is Mooncake's.
            first_have_failed_at = time.monotonic() + prefill.clock_ahead_s() + FIRST_FAIL_WITHIN_S
            time.sleep(seconds)
            failed = [prefill.send_to(other, SMALL) for _ in range(8)]
            outcomes = prefill.ask("outcomes", other.session)
        log = prefill.log()
    assert failed == [""] * 8, f"nothing is wrong with this decode node: {failed}"
    assert "All rails failed for context" not in log, "a device of the prefill's was switched off for good"
    if beside_traffic:
        assert [why_not for began, _, why_not in outcomes if why_not and began > first_have_failed_at] == []
        before, meanwhile = (
            statistics.median(ended - began for began, ended, _ in outcomes if (began > first_have_failed_at) is late)
            for late in (False, True)
        )
        assert meanwhile < 2 * before, f"its requests took {before:.3f} s before, {meanwhile:.3f} s meanwhile"
