"""Do decode nodes that cannot be reached over RDMA any harm to another one? Each machine has two devices.

In a file of its own, because only one set of machines runs at a time: that of the other tests has ended.
"""

from __future__ import annotations

import statistics
import time

import pytest
from machines import Pair
from remote_node import RemoteNode
from test_rdma import GIVEN_UP_S, SERVED_WITHIN_S, Record, check
from test_rdma_two_devices import SMALL
from trial import REQUEST_EVERY_S, THIS_PATCH, nodes, play

pytestmark = [pytest.mark.timeout(1200), pytest.mark.in_full]
LOOKED_AT_BEFORE_S = 20.0
# What the first failed transfers do to others is Mooncake's.
FIRST_FAIL_WITHIN_S = 20.0
INTERVAL_S = 30.0
# What Mooncake logs when it switches a device of the prefill's off for good.
DEVICE_OFF = "All rails failed for context"


class OtherNode:
    """A decode node in the third machine, which is well. From now on it gets requests all the time."""

    def __init__(self, prefill: RemoteNode, node: RemoteNode) -> None:
        self._prefill, self._node = prefill, node
        prefill.ask("request", [node.session], SMALL, REQUEST_EVERY_S)
        time.sleep(LOOKED_AT_BEFORE_S)
        self._cut_at = prefill.clock_ahead_s() + time.monotonic()

    def check(self) -> None:
        """Fails if it was harmed since, by anything but the first failed transfers."""
        outcomes = self._prefill.ask("outcomes", self._node.session)
        since = self._cut_at + FIRST_FAIL_WITHIN_S
        assert [why_not for began, _, why_not in outcomes if why_not and began > since] == []
        before, meanwhile = (
            statistics.median(ended - began for began, ended, _ in outcomes if first < began < last)
            for first, last in ((0.0, self._cut_at), (since, float("inf")))
        )
        assert meanwhile < 2 * before, f"its requests took {before:.3f} s before, {meanwhile:.3f} s meanwhile"


@pytest.mark.parametrize(("seconds", "beside_traffic"), [(600, False), (120, True)])
def test_decode_nodes_that_cannot_be_reached_do_no_harm_to_another(
    pair_beside_another: Pair, seconds: float, beside_traffic: bool
) -> None:
    pair = pair_beside_another
    assert pair.other_decode is not None
    if beside_traffic:  # on a flat network, Mooncake's own failing transfers harm others for a minute
        pair.remember_addresses()
    with nodes(pair, sessions=8) as (prefill, decodes), RemoteNode(pair.other_decode, "other", "decode") as other:
        prefill.register(other)
        assert prefill.send_to(other, SMALL) == "", "a transfer between healthy nodes has failed"
        used = OtherNode(prefill, other) if beside_traffic else None
        prefill.ask("request", [decode.session for decode in decodes], SMALL, REQUEST_EVERY_S)
        with pair.dropped(*pair.rdma):
            time.sleep(seconds)
            failed = [prefill.send_to(other, SMALL) for _ in range(8)]
            if used:
                used.check()
        log = prefill.log()
    assert failed == [""] * 8, f"nothing is wrong with this decode node: {failed}"
    assert DEVICE_OFF not in log


@pytest.mark.parametrize(
    ("addresses", "within_s"), [("known", SERVED_WITHIN_S), ("looked for", INTERVAL_S + SERVED_WITHIN_S)]
)
def test_decode_nodes_are_used_again_beside_another_that_is_in_use(
    pair_beside_another: Pair, addresses: str, within_s: float, record: Record
) -> None:
    """Reads that fail hold up nobody where no address has to be looked for: there they go on without a rest."""
    pair = pair_beside_another
    assert pair.other_decode is not None
    if addresses == "known":
        pair.remember_addresses()
    with nodes(pair, sessions=2) as (prefill, decodes), RemoteNode(pair.other_decode, "other", "decode") as other:
        prefill.register(other)
        used = OtherNode(prefill, other)
        trial = play(prefill, decodes, lambda: pair.dropped(*pair.rdma), 60, GIVEN_UP_S, SMALL)
        used.check()
    record(f"packets dropped, 60 s, beside requests to a third machine, addresses {addresses}", THIS_PATCH, 5, trial, 2)
    check(trial, within_s)
    assert DEVICE_OFF not in trial.mooncake
