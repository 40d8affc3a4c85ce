"""Do sessions that take turns to be read over RDMA keep each other neither out for long nor busy, in any story?"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Optional

from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.disaggregation.mooncake.session_states import Verdict
from virtual_prober import DATA_PORT_REJECTED, HEALTHY, HUNG, READS_NEVER_END, REFUSING, Peer, VirtualProber, many

MACHINES = [many("a", 4), many("b", 2), ["c:1"]]
SESSIONS = [*itertools.chain(*MACHINES)]
IN_USE = "well:1"
INTERVAL_S = 30.0
A_MOMENT_S = 2.0
HOLDS_UP_OTHERS = Peer(memory=Verdict.UNREADABLE, read_takes=10.0)
HOLDS_UP_NOBODY = dataclasses.replace(HOLDS_UP_OTHERS, held_up=0.1)
BESIDE_OTHER_READS = dataclasses.replace(HOLDS_UP_OTHERS, read_takes=60.0)
PEERS = [
    HEALTHY,
    REFUSING,
    HUNG,
    HOLDS_UP_OTHERS,
    HOLDS_UP_NOBODY,
    BESIDE_OTHER_READS,
    READS_NEVER_END,
    DATA_PORT_REJECTED,
]


@dataclasses.dataclass(frozen=True)
class Step:
    """Transfers to these sessions fail, or their peers become other ones or, with no peer, register; time passes."""

    sessions: list[str]
    peer: Optional[Peer]
    fails: bool
    seconds: float


STEPS = st.builds(
    Step,
    st.one_of(st.sampled_from(MACHINES), st.lists(st.sampled_from(SESSIONS), min_size=1, unique=True)),
    st.sampled_from([*PEERS, None]),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0, 3.0, 12.0, 40.0, 130.0]),
)


class Story:
    """Requests for every session go on throughout."""

    def __init__(self, beside_one_in_use: bool) -> None:
        self.prober = VirtualProber()
        self.prober.watch.rules.over_rdma = True
        self.prober.registrations.update({session: object() for session in SESSIONS + [IN_USE] * beside_one_in_use})

    def play(self, step: Step) -> None:
        for session in step.sessions:
            if step.peer is None:
                self.prober.register(session)
            elif step.fails:
                self.prober.fail(session, peer=step.peer)
            elif step.peer is HEALTHY:
                self.prober.resume(session)
            else:
                self.prober.becomes(session, step.peer)
        self.goes_on(step.seconds)

    def goes_on(self, seconds: float) -> None:
        until = self.prober.clock.now + seconds
        while self.prober.clock.now < until:
            self.prober.run(min(1.0, until - self.prober.clock.now))
            for session in SESSIONS:
                self.prober.request(session)


@settings(max_examples=150)
@given(st.booleans(), st.lists(STEPS, min_size=2, max_size=12), st.data())
def test_whoever_heals_is_let_in_within_interval_for_each_session_of_its_machine_and_none_is_probed_all_the_time(
    beside_one_in_use: bool, steps: list[Step], data: st.DataObject
) -> None:
    story = Story(beside_one_in_use)
    for step in steps:
        story.play(step)
    prober = story.prober
    if prober.sessions:
        healed = data.draw(st.sampled_from(sorted(prober.sessions)))
        (machine,) = (machine for machine in MACHINES if healed in machine)
        held_until = max(prober.clock.now, prober.watch.known[healed].hold_ends_at())
        prober.resume(healed)
        story.goes_on(held_until - prober.clock.now + INTERVAL_S * len(machine) + A_MOMENT_S)
        assert healed not in prober.sessions, "it healed and was not let in"
    for session in SESSIONS:
        times = sorted(prober.moments("probe", session) + prober.moments("read", session))
        soonest_s = min((later - at for at, later in zip(times, times[15:], strict=False)), default=1.0)
        assert soonest_s >= 1.0, f"{session} is probed all the time"
