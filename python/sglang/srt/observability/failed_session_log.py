"""Which log line does an operator read for which event of a blacklisted session?

When a whole rack fails, the first sessions are named and the others counted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.disaggregation.mooncake import session_probe, session_watch
from sglang.srt.disaggregation.mooncake.session_watch import Event
from sglang_failed_session_probe import mooncake_wheels
from sglang_failed_session_probe.harmless_logger import logger
from sglang_failed_session_probe.printable import printable_repr

# So many lines of a kind are logged in a spell, enough for a decode instance of two nodes; the others are counted.
LINES_IN_A_SPELL = 20
SPELL_S = 10.0


class _Line(NamedTuple):
    """A log line about a session; ``kind`` says what is counted where lines are left out."""

    kind: str
    text: str
    level: int = logging.WARNING


# The fields of the texts are the details of the event, and what ``FailedSessionLog.heard`` adds.
_LINES = {
    Event.BLACKLISTED: _Line(
        "sessions blacklisted",
        "Session %(session)s is blacklisted, because a transfer to it failed: requests for it are refused; %(until)s",
    ),
    Event.UNREADABLE: _Line(
        "sessions that answer but cannot be verified",
        "Session %(session)s answers probes, but %(why)s, so it stays blacklisted (for %(outage_s).1f s "
        "by now). If it goes on, look at the data path between this node and that decode node%(other_cause)s",
    ),
    Event.CUTS_SHORT: _Line(
        "sessions that take connections but cut probes short",
        "Session %(session)s takes connections but cuts every probe short (for %(outage_s).1f s by now): it "
        "stays blacklisted until it answers or registers again. Mooncake before %(first_that_answers)s does that (look "
        "at its version on that decode node), or a proxy for a process that is gone",
    ),
    Event.HELD: _Line(
        "sessions held after a relapse",
        "Session %(session)s (relapse %(relapses)d) failed again soon after its recovery; held for %(hold_s)gs",
    ),
    Event.RECOVERED: _Line(
        "sessions let in again",
        "Session %(session)s recovered via probe; un-blacklisted (out for %(outage_s).1f s, %(refused)d requests "
        "refused)",
        logging.INFO,
    ),
    Event.DROPPED: _Line(
        "blacklisted sessions forgotten",
        "Forgot blacklisted session %(session)s: no request for %(idle_s).0fs (out for %(outage_s).1f s, "
        "%(refused)d requests refused)",
        logging.INFO,
    ),
    Event.MALFORMED: _Line(
        "session ids that are not host:port",
        "Session id %(quoted_session)s is not host:port with a port from 1 to 65535: it is never probed",
    ),
    Event.VERIFICATION_OFF: _Line(
        "sessions that work though they cannot be read",
        "Session %(session)s works though its memory cannot be read: reads prove nothing on this transport, so "
        "from now on this process lets sessions in when they answer probes",
    ),
    Event.FAULT: _Line(
        "faults of its own",
        "Failed-session probe: a fault of its own at session %(session)s, said once; SGLang is not affected\n"
        "%(traceback)s",
        logging.ERROR,
    ),
}
# Beside the line of Event.RECOVERED.
_LET_IN_UNVERIFIED = _Line(
    "sessions let in without proof",
    "Session %(session)s was let in on probation without proof that transfers work: it answers probes, but "
    "%(unverified)s. If it fails again, look at the data path between this node and that decode node",
)
_PROBE_RAISED = _Line(
    "sessions whose probes raise",
    "Probing session %(session)s raised %(error)s (said once); it is asked again",
)


@dataclasses.dataclass
class _Spell:
    """The SPELL_S after a line of a kind was logged for the first time."""

    began: float
    said: int = 0
    left_out: int = 0
    last_left_out: float = 0.0
    summed_up: bool = False


class FailedSessionLog:
    """What one manager logs about its sessions; ``can_probe``: they are probed. Any thread, no lock held."""

    def __init__(self, can_probe: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._until = (
            "it is probed until it can be used again" if can_probe else "it stays out until it registers again"
        )
        self._clock = clock
        self._spells: dict[_Line, _Spell] = {}
        self._raising = session_watch.Said()
        self._crowded = False

    def heard(self, event: Event, session: Any, details: dict[str, Any]) -> None:
        """Logs what happened to the session."""
        if event in (Event.RECOVERED, Event.DROPPED):
            self._raising.forget(session)
        if event is Event.BLACKLISTED and (details["relapses"] or not session_watch.is_session_id(session)):
            return  # the line of HELD or MALFORMED says so
        self._say(_LINES[event], session, details)
        if details.get("unverified"):
            self._say(_LET_IN_UNVERIFIED, session, details)

    def _fields(self, session: Any, details: dict[str, Any]) -> dict[str, Any]:
        """What the texts may name."""
        return {
            **details,
            "session": session,
            "quoted_session": printable_repr(session),
            "until": self._until,
            "other_cause": self._other_cause,
            "first_that_answers": mooncake_wheels.FIRST_MOONCAKE_THAT_ANSWERS,
            "traceback": details.get("traceback", "").splitlines(),
        }

    @functools.cached_property
    def _other_cause(self) -> str:
        if not session_probe.has_short_queue():
            return ""
        return (
            ". It may also be Mooncake's queue to it that is stuck since a burst of more than 1,024 blocks: set "
            f"{mooncake_wheels.LONG_QUEUE} and start this node anew"
        )

    def probe_raised(self, session: str, error: BaseException) -> None:
        """Logs it once for each session, until that is let in again or forgotten."""
        if not self._raising.is_new(session):
            return
        self._say(_PROBE_RAISED, session, {"error": error})

    def page_refused(self, why: str) -> None:
        """Logs that no peer's memory can be read for now."""
        logger.warning(
            "Failed-session probe: %s, so no peer's memory can be read for now: sessions are let in when they answer "
            "probes. It is tried again",
            why,
        )

    def stuck(self, number: int, most: int) -> None:
        """Logs that as many probes are under way as may be; again only after half of them have returned."""
        if number >= most and not self._crowded:
            self._crowded = True
            logger.warning(
                "Failed-session probe: %d probes hang, as many as may; peers that hang are asked in turns now", number
            )
        elif number < most / 2:
            self._crowded = False

    def sum_up(self, at_once: bool = False) -> None:
        """Logs how many lines were left out in spells that are over; with ``at_once`` in all, once for each."""
        now = self._clock()
        for line, spell in list(self._spells.items()):
            over = now >= spell.began + SPELL_S
            if over:
                self._spells.pop(line, None)
            if spell.left_out and (over or (at_once and not spell.summed_up)):
                logger.log(
                    line.level,
                    "Failed-session probe: %s: %d more within %.1f s, not named one by one",
                    line.kind,
                    spell.left_out,
                    spell.last_left_out - spell.began,
                )
                spell.left_out, spell.summed_up = 0, True

    def _say(self, line: _Line, session: Any, details: dict[str, Any]) -> None:
        """Logs the line, or leaves it out and counts it."""
        self.sum_up()
        now = self._clock()
        spell = self._spells.setdefault(line, _Spell(now))
        if spell.said < LINES_IN_A_SPELL:
            spell.said += 1
            logger.log(line.level, line.text, self._fields(session, details))
        else:
            spell.left_out += 1
            spell.last_left_out = now
