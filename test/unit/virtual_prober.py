"""How does the daemon thread treat the blacklist, in virtual time and with peers that do what a test tells them?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.session_probe import Reads
from sglang.srt.disaggregation.mooncake.session_states import TRANSFER_TIMEOUT_S, Verdict
from sglang.srt.disaggregation.mooncake.session_watch import Event, SessionWatch
from sglang.srt.environ import FailedSessionProbeSettings

ROUND_S = 0.000001  # what one round of the daemon thread takes: time never stands still
ENDING_TAKES_S = 0.005  # until a call that was ended comes back
STOP_GRACE_S = 0.2  # for so long after a shutdown answers are still heard


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass(frozen=True)
class Peer:
    """What a decode node does from now on; times in seconds, as measured on real Mooncake."""

    answers: bool = True
    takes: float = 0.0002
    connect_takes: float = 0.0  # of it
    memory: Verdict = Verdict.READABLE
    read_takes: float = 0.001
    begin_takes: float = 0.0  # for so long the call that begins to read does not return
    falls_silent: bool = False  # when its memory is to be read
    cuts_short: bool = False  # it takes connections and ends probes at once
    held_up: float = 1.0  # for that share of its reads, over RDMA, transfers to others have to wait
    why: str = ""  # it cannot be told whether its memory can be read


HEALTHY = Peer()
REFUSING = Peer(answers=False, takes=0.00003)  # process gone
CUTS_SHORT = Peer(answers=False, takes=0.001, cuts_short=True)
HUNG = Peer(answers=False, takes=60.0)  # process stopped; VirtualProber.resume lets it go on
DROPPED = Peer(answers=False, takes=5.0, connect_takes=5.0)  # packets are
DATA_PORT_REJECTED = Peer(memory=Verdict.UNREADABLE)
DATA_PORT_DROPPED = Peer(memory=Verdict.UNREADABLE, read_takes=30.0)
READS_NEVER_END = Peer(read_takes=math.inf)


def many(host: str, number: int) -> list[str]:
    """So many sessions of one host."""
    return [f"{host}:{port}" for port in range(1, number + 1)]


class Entry(NamedTuple):
    """Something that happened: an Event, or one of "failed", "registered", "requested", "shutdown", "probe", "read"
    (a probe that reads if it is answered), "answer", "ended" (a call that hung) and "shown" (by reads).
    """

    at: float
    what: Any
    session: Any
    detail: Any


class VirtualProber:
    """Sleeps and wakes as the daemon thread does: until something is due, an answer comes, or it is woken."""

    def __init__(
        self,
        *blacklisted: Any,
        jitter: float = 0.5,
        calls_can_be_ended: bool = True,
        ending_takes_s: float = ENDING_TAKES_S,
        transfer_timeout_s: float = TRANSFER_TIMEOUT_S,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        self.log: list[Entry] = []
        self.removed: list[Any] = []  # what the watch itself took off
        self.out: dict[Call, tuple[float, bool]] = {}  # under way: when its answer comes, and which
        self.reads: dict[Call, tuple[float, Verdict]] = {}  # pending: when they end, and what they show
        self.registrations: dict[Any, object] = {}
        self._peers: dict[Any, Peer] = {}
        self._probe_answered_at: dict[Call, float] = {}
        self._connected_at: dict[Call, float] = {}
        self._calls_can_be_ended = calls_can_be_ended
        self._ending_takes_s = ending_takes_s
        self._woken = False
        self._wakes_at = math.inf
        self._shut_down_at = math.inf
        self.watch = SessionWatch(
            FailedSessionProbeSettings(**settings),
            blacklisted,
            clock=self.clock,
            jitter=lambda: jitter,
            wake=self._wake,
            on_removed=self.removed.append,
            registrations=lambda: self.registrations,
            transfer_timeout_s=transfer_timeout_s,
        )
        self.sessions = self.watch.sessions

    # What happens to the prefill node.

    def fail(self, *sessions: Any, peer: Optional[Peer] = None) -> None:
        """A transfer to each session fails; ``peer`` says how they behave from then on."""
        for session in sessions:
            self._peers[session] = peer or self._peers[session]
            self._note("failed", session)
            self.sessions.add(session)

    def becomes(self, session: Any, peer: Peer) -> None:
        """The peer behaves differently from the next call on."""
        self._peers[session] = peer

    def resume(self, session: Any) -> None:
        """The peer's process goes on (SIGCONT): it is healthy, and what hangs or is pending ends at once."""
        self._peers[session] = HEALTHY
        for call in self.out:
            if call.session == session and not call.ended:
                self.answer(call, True)
        for call in self.reads:
            if call.session == session:
                self.reads[call] = self.clock.now, Verdict.READABLE_LATE

    def answer(self, call: Call, answer: bool) -> None:
        """The answer to a call under way comes now, whatever its peer was to do."""
        self.out[call] = self.clock.now, answer

    def show(self, call: Call, verdict: Verdict) -> None:
        """Pending reads end now, whatever their peer was to do."""
        self.reads[call] = self.clock.now, verdict

    def register(self, session: Any) -> None:
        """The decode side registers its memory again."""
        self._note("registered", session)
        self.registrations[session] = object()
        self.sessions.discard(session)

    def register_as_up_to_0_5_21(self, session: Any) -> None:
        """The same on a release that takes a session off the blacklist only if it is on it."""
        self._note("registered", session)
        self.registrations[session] = object()
        if session in self.sessions:
            self.sessions.remove(session)

    def request(self, session: Any) -> bool:
        """A request asks for the session; True if it is refused."""
        self._note("requested", session)
        return session in self.sessions

    def shut_down(self) -> None:
        """The manager is torn down: the daemon thread ends, and SGLang's own threads may go on for a while."""
        self._note("shutdown", None)
        self._shut_down_at = self.clock.now
        self._wakes_at = math.inf

    # The daemon thread.

    def run(self, seconds: float) -> None:
        """Lets time pass. Fails if the daemon thread does not sleep meanwhile."""
        end = self.clock.now + seconds
        idle_rounds = 0
        while True:
            came = [call for call, (at, _) in self.out.items() if at <= self.clock.now]
            shown = [call for call, (at, _) in self.reads.items() if at <= self.clock.now]
            if came or shown or self._woken or self._wakes_at <= self.clock.now:
                self._woken = False
                self._hand_over(came, shown)
                idle_rounds = 0 if self._start_due() or came or shown else idle_rounds + 1
                assert idle_rounds < 1000, "the daemon thread spins, and keeps a core of the prefill node busy"
                self.clock.now += ROUND_S
            moment = min([self._wakes_at, *(at for at, _ in self.out.values()), *(at for at, _ in self.reads.values())])
            if self._woken or moment <= self.clock.now:
                continue
            if moment > end:
                self.clock.now = end
                return
            self.clock.now = moment

    def sleeps_for_good(self) -> bool:
        """True if the daemon thread runs no timer."""
        return self._wakes_at == math.inf

    def is_awake(self) -> bool:
        """True if the daemon thread was woken and has not run since."""
        return self._woken

    def _wake(self) -> None:
        self._woken = True

    def _hand_over(self, came: Iterable[Call], shown: Iterable[Call]) -> None:
        over = self.clock.now > self._shut_down_at + STOP_GRACE_S  # nobody hears it any more
        for call in came:
            _, answered = self.out.pop(call)
            del self._probe_answered_at[call], self._connected_at[call]
            if over:
                continue
            self._note("answer", call.session, (call, answered))
            peer = self._peers[call.session]
            reading = call.read and answered
            took_s = self.clock.now - call.made_at
            refused = not answered and took_s < 1.0 and not call.ended
            cuts_short = call.listen and peer.cuts_short
            said = "answered" if answered else "cut short" if cuts_short else "refused" if refused else "no answer"
            self.watch.answered(call, answered, refused=refused, cuts_short=cuts_short, reading=reading, said=said)
            if reading:
                self.reads[call] = self._reads_of(call, peer)
            self._note_events()
        for call in shown:
            _, verdict = self.reads.pop(call)
            if not over:
                self._note("shown", call.session, (call, verdict))
                why = {
                    Verdict.UNREADABLE: "reading its memory gave -1",
                    Verdict.READABLE_TOO_SOON: "bytes of a failed transfer may still land",
                    Verdict.CANNOT_TELL: self._peers[call.session].why,
                }
                peer = self._peers[call.session]
                self.watch.read(call, verdict, why.get(verdict, ""), peer.held_up)
                self._note_events()

    def _reads_of(self, call: Call, peer: Peer) -> tuple[float, Verdict]:
        """When the reads end that the call has begun, and what they show."""
        if call.ended:
            return self.clock.now, Verdict.UNREADABLE
        late = peer.memory is Verdict.READABLE and peer.read_takes >= Reads.LATE_S
        return self.clock.now + peer.read_takes, Verdict.READABLE_LATE if late else peer.memory

    def _start_due(self) -> int:
        if self._shut_down_at <= self.clock.now:
            return 0
        self._note_events()
        for call in self.out:
            call.answered = self.clock.now >= self._probe_answered_at[call]
        calls = self.watch.take_due()
        for call in calls:
            self._make(call)
        for call in self.watch.to_end():
            if self._calls_can_be_ended and call in self.out:
                self._end(call)
        for call in self.watch.to_end_if_connecting():
            if self._calls_can_be_ended and self.clock.now < self._connected_at[call]:
                call.not_connected = True
                self._end(call)
        due_in = self.watch.next_due_in()
        self._wakes_at = math.inf if due_in is None else self.clock.now + due_in
        self._note_events()
        return len(calls)

    def _end(self, call: Call) -> None:
        self._note("ended", call.session, call)
        call.ended = True
        returns_at = self.clock.now + self._ending_takes_s
        self.out[call] = min(returns_at, self.out[call][0]), call.read and call.answered

    def _make(self, call: Call) -> None:
        peer = self._peers[call.session]
        # Before the events of the same moment: a session is forgotten after its call was made, never before.
        self.log.append(Entry(self.clock.now, "read" if call.read else "probe", call.session, call))
        takes_s = peer.takes + (peer.begin_takes if call.read else 0.0)
        answers = peer.answers and not (call.read and peer.falls_silent)
        self.out[call] = self.clock.now + takes_s, answers
        self._connected_at[call] = self.clock.now + peer.connect_takes
        self._probe_answered_at[call] = self.clock.now + peer.takes if answers else math.inf

    def _note(self, what: Any, session: Any, detail: Any = None) -> None:
        self._note_events()
        self.log.append(Entry(self.clock.now, what, session, detail))

    def _note_events(self) -> None:
        while self.watch.events:
            self.log.append(Entry(self.clock.now, *self.watch.events.popleft()))

    # What a test asks.

    def seen(self, what: Any, session: Any = None) -> list[Entry]:
        """The entries of that kind, of one session or of all."""
        self._note_events()
        return [entry for entry in self.log if entry.what == what and session in (None, entry.session)]

    def moments(self, what: Any, session: Any = None) -> list[float]:
        """When that happened, to the millisecond."""
        return [round(entry.at, 3) for entry in self.seen(what, session)]

    def let_in(self, session: Any) -> list[tuple[float, Optional[str]]]:
        """When the session was let in again, and the reason if that was without proof."""
        return [(round(entry.at, 3), entry.detail["unverified"]) for entry in self.seen(Event.RECOVERED, session)]
