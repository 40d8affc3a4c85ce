"""Are decode nodes used again over RDMA when their fault is over, if each machine has two devices?"""

from __future__ import annotations

import pytest
from machines import RDMA, Pair
from test_rdma import DEVICE_RESTS_S, GIVEN_UP_S, SERVED_WITHIN_S, Record, check
from trial import BEFORE, LIMIT, THIS_PATCH, Contender, nodes, play

pytestmark = [pytest.mark.timeout(1200), pytest.mark.in_full]
SMALL = 4096  # eight sessions' requests are to leave the emulated processors time


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
