"""How does the daemon thread treat the blacklist, in virtual time and with peers that do what a test tells them?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from sglang.srt.disaggregation.mooncake.failed_sessions import Event, FailedSessions, Question, Verdict
from sglang.srt.disaggregation.mooncake.session_probe import LATE_S
from sglang.srt.environ import FailedSessionProbeSettings

ROUND_S = 0.000001  # what one round of the daemon thread takes: time never stands still
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
    memory: Verdict = Verdict.READABLE
    read_takes: float = 0.001


HEALTHY = Peer()
REFUSING = Peer(answers=False, takes=0.00003)  # process gone
HUNG = Peer(answers=False, takes=60.0)  # process stopped; VirtualProber.resume lets it go on
DATA_PORT_REJECTED = Peer(memory=Verdict.UNREADABLE)
DATA_PORT_DROPPED = Peer(memory=Verdict.UNREADABLE, read_takes=30.0)


class Entry(NamedTuple):
    """Something that happened: an Event, or one of "failed", "registered", "requested", "shutdown", "probe",
    "verification" and "answer".
    """

    at: float
    what: Any
    session: Any
    detail: Any


class VirtualProber:
    """Sleeps and wakes as the daemon thread does: until something is due, an answer comes, or it is woken."""

    def __init__(
        self, *blacklisted: Any, jitter: float = 0.5, stuck_limit: Optional[int] = None, **settings: Any
    ) -> None:
        self.clock = Clock()
        self.log: list[Entry] = []
        self.removed: list[Any] = []  # what the blacklist itself took off
        self.out: dict[Question, tuple[float, Any]] = {}  # under way: when its answer comes, and which
        self.registrations: dict[Any, object] = {}
        self._peers: dict[Any, Peer] = {}
        self._woken = False
        self._wakes_at = math.inf
        self._shut_down_at = math.inf
        self.sessions = FailedSessions(
            FailedSessionProbeSettings(**settings),
            blacklisted,
            clock=self.clock,
            jitter=lambda: jitter,
            wake=self._wake,
            on_removed=self.removed.append,
            registration=self.registrations.get,
            stuck_limit=stuck_limit,
        )

    # What happens to the prefill node.

    def fail(self, *sessions: Any, peer: Optional[Peer] = None) -> None:
        """A transfer to each session fails; ``peer`` says how they behave from then on."""
        for session in sessions:
            self._peers[session] = peer or self._peers[session]
            self._note("failed", session)
            self.sessions.add(session)

    def becomes(self, session: Any, peer: Peer) -> None:
        """The peer behaves differently from the next question on."""
        self._peers[session] = peer

    def resume(self, session: Any) -> None:
        """The peer's process goes on (SIGCONT): it is healthy, and a probe that hangs is answered at once."""
        self._peers[session] = HEALTHY
        for question in self.out:
            if question.session == session:
                self.answer(question, Verdict.READABLE if question.verify else True)

    def answer(self, question: Question, answer: Any) -> None:
        """The answer to a question under way comes now, whatever its peer was to do."""
        self.out[question] = self.clock.now, answer

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
            came = [question for question, (at, _) in self.out.items() if at <= self.clock.now]
            if came or self._woken or self._wakes_at <= self.clock.now:
                self._woken = False
                self._hand_over(came)
                idle_rounds = 0 if self._start_due() or came else idle_rounds + 1
                assert idle_rounds < 1000, "the daemon thread spins, and keeps a core of the prefill node busy"
                self.clock.now += ROUND_S
            moment = min([self._wakes_at, *(at for at, _ in self.out.values())])
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

    def _hand_over(self, came: Iterable[Question]) -> None:
        for question in came:
            _, answer = self.out.pop(question)
            if self.clock.now > self._shut_down_at + STOP_GRACE_S:
                continue  # nobody hears it any more
            self._note("answer", question.session, (question, answer))
            if question.verify:
                self.sessions.verified(question, answer, "reading its memory gave -1")
            else:
                self.sessions.answered(question, answer)
            self._note_events()

    def _start_due(self) -> int:
        if self._shut_down_at <= self.clock.now:
            return 0
        questions = self.sessions.take_due()
        for question in questions:
            self._ask(question)
        due_in = self.sessions.next_due_in()
        self._wakes_at = math.inf if due_in is None else self.clock.now + due_in
        self._note_events()
        return len(questions)

    def _ask(self, question: Question) -> None:
        peer = self._peers[question.session]
        if question.verify:
            self._note("verification", question.session, question)
            late = peer.memory is Verdict.READABLE and peer.read_takes >= LATE_S
            self.out[question] = self.clock.now + peer.read_takes, Verdict.READABLE_LATE if late else peer.memory
        else:
            self._note("probe", question.session, question)
            self.out[question] = self.clock.now + peer.takes, peer.answers

    def _note(self, what: Any, session: Any, detail: Any = None) -> None:
        self._note_events()
        self.log.append(Entry(self.clock.now, what, session, detail))

    def _note_events(self) -> None:
        while self.sessions.events:
            self.log.append(Entry(self.clock.now, *self.sessions.events.popleft()))

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
