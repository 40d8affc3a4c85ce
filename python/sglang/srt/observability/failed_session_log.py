"""Which line does an operator read for which event of a blacklisted session?

When a rack goes, the first sessions are named and the others counted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.mooncake import session_probe, session_watch
from sglang.srt.disaggregation.mooncake.session_watch import Event
from sglang_failed_session_probe.harmless_logger import logger
from sglang_failed_session_probe.printable import printable_repr

# Lines of a kind that are said in a spell, enough for a decode instance of two nodes; the others are summed up in one.
LINES_IN_A_SPELL = 20
SPELL_S = 10.0


@dataclasses.dataclass
class _Spell:
    """From the first line of a kind on, SPELL_S long."""

    level: int
    began: float
    said: int = 0
    left_out: int = 0
    last_left_out: float = 0.0
    summed_up: bool = False


class FailedSessionLog:
    """What one manager says of its sessions; with ``can_probe`` they are probed. Any thread, no lock held."""

    def __init__(self, can_probe: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._until = (
            "it is probed until it can be used again" if can_probe else "it stays out until it registers again"
        )
        self._clock = clock
        self._spells: dict[str, _Spell] = {}
        self._raising = session_watch.Said()
        self._crowded = False

    def heard(self, event: Event, session: Any, details: dict[str, Any]) -> None:
        """Says what happened to the session."""
        if event in (Event.RECOVERED, Event.DROPPED):
            self._raising.forget(session)
        if event is Event.BLACKLISTED and not details["relapses"] and session_watch.is_session_id(session):
            self._say(
                logging.WARNING,
                "sessions blacklisted",
                "Session %s is blacklisted, because a transfer to it failed: requests for it are refused; %s",
                session,
                self._until,
            )
        elif event is Event.UNREADABLE:
            self._say(
                logging.WARNING,
                "sessions that answer but cannot be verified",
                "Session %s answers probes, but %s, so it stays blacklisted (for %.1f s by now). If it goes on, look "
                "at the data path between this node and that decode node%s",
                session,
                details["why"],
                details["outage_s"],
                self._other_cause,
            )
        elif event is Event.CUTS_SHORT:
            self._say(
                logging.WARNING,
                "sessions that take connections but cut probes short",
                "Session %s takes connections but cuts every probe short (for %.1f s by now): it stays blacklisted "
                "until it answers or registers again. Mooncake before %s does that (look at its version on that decode "
                "node), or a proxy for a process that is gone",
                session,
                details["outage_s"],
                session_probe.FIRST_MOONCAKE_THAT_ANSWERS,
            )
        elif event is Event.HELD:
            self._say(
                logging.WARNING,
                "sessions held after a relapse",
                "Session %s (relapse %d) failed again soon after its recovery; held for %gs",
                session,
                details["relapses"],
                details["hold_s"],
            )
        elif event is Event.RECOVERED:
            self._say_recovered(session, details)
        elif event is Event.DROPPED:
            self._say(
                logging.INFO,
                "blacklisted sessions forgotten",
                "Forgot blacklisted session %s: no request for %.0fs (out for %.1f s, %d requests refused)",
                session,
                details["idle_s"],
                details["outage_s"],
                details["refused"],
            )
        elif event is Event.MALFORMED:
            self._say(
                logging.WARNING,
                "session ids that are not host:port",
                "Session id %s is not host:port with a port from 1 to 65535: it is never probed",
                printable_repr(session),
            )
        elif event is Event.VERIFICATION_OFF:
            logger.warning(
                "Session %s works though its memory cannot be read: reads prove nothing on this transport, "
                "so from now on this process lets sessions in when they answer probes",
                session,
            )
        elif event is Event.FAULT:
            logger.error(
                "Failed-session probe: a fault of its own at session %s, said once; SGLang is not affected\n%s",
                session,
                details["error"].splitlines(),
            )

    @functools.cached_property
    def _other_cause(self) -> str:
        if not session_probe.has_short_queue():
            return ""
        return (
            ". It may also be Mooncake's queue to it that is stuck since a burst of more than 1,024 blocks: set "
            "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER=65535 and start this node anew"
        )

    def probe_raised(self, session: str, error: BaseException) -> None:
        """Says it once a session, until that is let in again or forgotten."""
        if not self._raising.is_new(session):
            return
        self._say(
            logging.WARNING,
            "sessions whose probes raise",
            "Probing session %s raised %s (said once); it is asked again",
            session,
            error,
        )

    def page_refused(self, why: str) -> None:
        """Says that no peer's memory can be read for now."""
        logger.warning(
            "Failed-session probe: %s, so no peer's memory can be read for now: sessions are let in when they answer "
            "probes. It is tried again",
            why,
        )

    def stuck(self, number: int, most: int) -> None:
        """Says when as many probes are under way as may be; again only after half of them have come back."""
        if number >= most and not self._crowded:
            self._crowded = True
            logger.warning(
                "Failed-session probe: %d probes hang, as many as may; peers that hang are asked in turns now", number
            )
        elif number < most / 2:
            self._crowded = False

    def sum_up(self, at_once: bool = False) -> None:
        """Says how many lines were left out in the spells that are over; with ``at_once`` in all, once in each."""
        now = self._clock()
        for kind, spell in list(self._spells.items()):
            over = now >= spell.began + SPELL_S
            if over:
                self._spells.pop(kind, None)
            if spell.left_out and (over or (at_once and not spell.summed_up)):
                logger.log(
                    spell.level,
                    "Failed-session probe: %s: %d more within %.1f s, not named one by one",
                    kind,
                    spell.left_out,
                    spell.last_left_out - spell.began,
                )
                spell.left_out, spell.summed_up = 0, True

    def _say_recovered(self, session: Any, details: dict[str, Any]) -> None:
        self._say(
            logging.INFO,
            "sessions let in again",
            "Session %s recovered via probe; un-blacklisted (out for %.1f s, %d requests refused)",
            session,
            details["outage_s"],
            details["refused"],
        )
        if details["unverified"]:
            self._say(
                logging.WARNING,
                "sessions let in without proof",
                "Session %s was let in on probation without proof that transfers work: it answers probes, but %s. "
                "If it fails again, look at the data path between this node and that decode node",
                session,
                details["unverified"],
            )

    def _say(self, level: int, kind: str, text: str, *arguments: object) -> None:
        """Says the line, or leaves it out for the sum of its kind."""
        self.sum_up()
        now = self._clock()
        spell = self._spells.setdefault(kind, _Spell(level, now))
        if spell.said < LINES_IN_A_SPELL:
            spell.said += 1
            logger.log(level, text, *arguments)
        else:
            spell.left_out += 1
            spell.last_left_out = now
