"""What does an operator read of each session: since when is it out, and why is it not let in yet?

A row holds moments of a monotonic clock, which all processes of a machine share. The reader puts it into words: so they
are true when they are read, and cost the scheduler nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Optional

from sglang.srt.disaggregation.mooncake.probe_schedule import NEVER, Call, Places
from sglang.srt.disaggregation.mooncake.session_states import Session
from sglang.srt.disaggregation.mooncake.session_watch import SessionWatch, is_session_id
from sglang_failed_session_probe.printable import printable_repr


class Row(NamedTuple):
    """One session, as it was when somebody looked; None for what does not apply."""

    session: str
    blacklisted: bool  # False: on probation
    since: float  # when it was blacklisted
    refused: int  # requests
    probed_at: float
    probe_said: str  # in words; empty before the first probe
    hangs_since: Optional[float]  # when the probe was made that takes longer than a live peer's
    settled_at: Optional[float]  # when it has answered for SETTLE; None if it does not answer
    held_until: float
    reads_said: str  # in words; empty before the first reads
    reads_since: Optional[float]  # when the pending reads were begun
    unreadable: str  # why its memory cannot be read; on probation: why it was let in unverified; else empty
    opens_at: Optional[float]  # when it is let in unverified, if it answers until then
    turn_at: Optional[float]  # when it is read next, if it waits for its turn
    next_at: Optional[float]  # when it is probed next
    ends_at: float  # when it is forgotten if no request wants it; on probation: the latest end of that


def rows_of(watch: SessionWatch, now: float) -> Iterator[Row]:
    """A row for each session that the watch knows. Any thread, without ``session_lock``."""
    for known, call in watch.look():
        yield _row(known, call, now)


def _row(known: Session, call: Optional[Call], now: float) -> Row:
    """Reads each attribute once that another thread may change."""
    answered_since, reads_since, due_at, unreadable = (
        known.answered_since,
        known.reads_since,
        known.due_at,
        known.unreadable,
    )
    if call is not None and call.answered:
        reads_since = call.made_at  # the call is still beginning to read
    hangs = call is not None and not call.answered and now >= call.made_at + Places.YOUNG_S
    may_open = answered_since is not None and (unreadable or reads_since is not None)
    return Row(
        session=known.id if is_session_id(known.id) else printable_repr(known.id),
        blacklisted=known.blacklisted,
        since=known.blacklisted_at,
        refused=known.refused,
        probed_at=known.probed_at,
        probe_said=known.probe_said,
        hangs_since=call.made_at if call is not None and hangs else None,
        settled_at=None if answered_since is None else answered_since + known.rules.settings.settle_s,
        held_until=known.hold_ends_at(),
        reads_said=known.reads_said,
        reads_since=reads_since,
        unreadable=unreadable or "",
        opens_at=answered_since + known.opens_after_s() if answered_since is not None and may_open else None,
        turn_at=known.read_again_at if known.waits_for_turn(now) else None,
        next_at=due_at if 0.0 < due_at < NEVER else None,
        ends_at=known.ends_at(),
    )


def is_over(row: Row, now: float) -> bool:
    """True if its probation is over, for whose end the scheduler runs no timer and writes no file."""
    return not row.blacklisted and now >= row.ends_at


def why(row: Row, can_probe: bool, now: float) -> str:
    """Why it is not let in yet or, on probation, how long that lasts and whether it was verified."""
    if not row.blacklisted:
        unverified = f"; let in unverified: {row.unreadable}" if row.unreadable else ""
        return f"let in again, on probation for {seconds(row.ends_at - now)} more at most{unverified}"
    if not is_session_id(row.session):
        return "its id is not host:port, so it is never probed"
    if not can_probe:
        return "Mooncake cannot probe on this node: it stays out until it registers again"
    reasons = [_why_out(row, now)]
    if now < row.held_until:
        reasons.append(f"held for {seconds(row.held_until - now)} more, because it failed again")
    if row.opens_at is not None:
        reasons.append(f"let in unverified in {seconds(max(0.0, row.opens_at - now))} if it answers until then")
    return "; ".join(reasons)


def _why_out(row: Row, now: float) -> str:
    if row.hangs_since is not None:
        return f"its probe hangs, for {seconds(now - row.hangs_since)} by now"
    if row.settled_at is None:
        return "it does not answer" if row.probe_said else "it has not been probed yet"
    if now < row.settled_at:
        return f"it answers and settles, for {seconds(row.settled_at - now)} more"
    if row.reads_since is not None:
        return f"it answers, and reads of its memory have not ended for {seconds(now - row.reads_since)}"
    if row.unreadable:
        return f"it answers, but {row.unreadable}"
    if row.turn_at is not None and now < row.turn_at:
        return f"it answers, and is read in {seconds(row.turn_at - now)} or when another session of its machine can be"
    return "it answers"


def seconds(duration: float) -> str:
    return f"{duration:.1f} s" if duration < 100.0 else f"{duration:.0f} s"
