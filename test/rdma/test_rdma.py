"""Is a decode node used again over RDMA, first time right, when its fault is over?

The machines are emulated: times are those of seconds, and judged with room. The exact ones are in docs/rdma.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from machines import Pair
from trial import THIS_PATCH, nodes, play

Record = Callable[..., None]
SERVED_WITHIN_S = 5.0
GIVEN_UP_S = 60.0

pytestmark = pytest.mark.timeout(600)


def test_a_decode_node_whose_packets_were_dropped_is_used_again(pair: Pair, record: Record) -> None:
    with nodes(pair) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(*pair.rdma), 8, GIVEN_UP_S)
    record("packets dropped, 8 s", THIS_PATCH, 5, trial)
    assert "is blacklisted" in trial.said, f"the fault did no harm: {trial}"
    assert trial.worst_s() <= SERVED_WITHIN_S, f"a healed decode node was refused for long: {trial}"
    assert trial.lost_after_heal() == 0, f"a request was lost to a session that was let in too soon: {trial}"
