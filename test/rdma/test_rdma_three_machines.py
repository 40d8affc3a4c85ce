"""Do decode nodes that cannot be reached over RDMA any harm to another one? Each machine has two devices.

In a file of its own, because only one set of machines runs at a time: that of the other tests has ended.
"""

from __future__ import annotations

import statistics
import time

import pytest
from machines import Pair
from remote_node import RemoteNode
from test_rdma_two_devices import SMALL
from trial import REQUEST_EVERY_S, nodes

pytestmark = [pytest.mark.timeout(1200), pytest.mark.in_full]
LOOKED_AT_BEFORE_S = 20.0
FIRST_FAIL_WITHIN_S = 20.0


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
