"""Which sessions do the prefill schedulers of this node refuse right now, and why? Reads the files that they write."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from sglang_failed_session_probe import table
from sglang_failed_session_probe.own_files import leave_sglang_out
from sglang_failed_session_probe.printable import printable

if TYPE_CHECKING:
    from sglang.srt.observability.failed_session_file import Scheduler
    from sglang.srt.observability.failed_session_rows import Row

# While sessions are blacklisted the file is written once a second, or about every 10 s with thousands of them.
_OLD_S = 3.0
_NOBODY = (
    "no scheduler with this probe is seen here: run this on a prefill node, in its container or one that shares "
    "/dev/shm with it, as its user or as root. Whether the probe is on is said by its log and by "
    "`sglang-failed-session-probe doctor`"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    table.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Shows a row a session; 1 if no scheduler is seen, or a file cannot be read. With ``--watch`` until a
    KeyboardInterrupt.
    """
    leave_sglang_out()
    while True:
        schedulers, problems = _look()
        _show(schedulers, problems, arguments.json, watching=bool(arguments.watch))
        if not arguments.watch:
            return 1 if problems else 0
        time.sleep(arguments.watch)


def _look() -> tuple[list[Scheduler], list[str]]:
    """What the schedulers of this node have written, and a line for each problem."""
    from sglang.srt.observability import failed_session_file

    schedulers, problems = [], []
    for path in failed_session_file.paths():
        try:
            scheduler = failed_session_file.read(path)
        except failed_session_file.Unreadable as why:
            problems.append(f"{printable(str(path))} is left out: {why}")
        else:
            schedulers += [scheduler] if scheduler else []
    schedulers.sort(key=lambda scheduler: (scheduler.uid, scheduler.pid, scheduler.rank))
    return schedulers, problems if schedulers else [*problems, _NOBODY]


def _show(schedulers: list[Scheduler], problems: list[str], as_json: bool, watching: bool) -> None:
    from sglang.srt.observability import failed_session_rows

    now = time.monotonic()
    pairs = [
        (scheduler, row)
        for scheduler in schedulers
        for row in sorted(scheduler.rows, key=lambda row: (not row.blacklisted, row.since))
        if not failed_session_rows.is_over(row, now)
    ]
    said = [*problems, *_notes(schedulers, now)]
    lines = []
    if pairs:
        lines = table.aligned([_HEADINGS, *(_cells(*pair, now) for pair in pairs)], to_the_right=(2, 3))
    elif schedulers:
        lines = [f"nothing is blacklisted by scheduler {', '.join(map(_name, schedulers))}"]
    if as_json:
        table.show_json([_facts(*pair, now) for pair in pairs])
    elif watching:
        lines, said = lines + said, []
    if not as_json and lines:
        table.show(lines, watching)
    for line in said:
        print(f"sglang-failed-session-probe sessions: {line}", file=sys.stderr)


def _notes(schedulers: list[Scheduler], now: float) -> list[str]:
    """Where the table is old or not complete."""
    notes = []
    for scheduler in schedulers:
        age_s, left_out = now - scheduler.written_at, scheduler.known - len(scheduler.rows)
        if age_s > _OLD_S and any(row.blacklisted for row in scheduler.rows):
            notes.append(f"scheduler {_name(scheduler)} is shown as it was {age_s:.0f} s ago")
        if left_out > 0:
            notes.append(f"scheduler {_name(scheduler)} knows {left_out} sessions more")
    return notes


def _name(scheduler: Scheduler) -> str:
    whose = "" if scheduler.uid == os.geteuid() else f"of user {scheduler.uid}"
    return printable(" ".join(filter(None, (str(scheduler.pid), scheduler.rank, whose))), table.LONGEST_CELL)


_HEADINGS = ("scheduler", "session", "out for", "requests refused", "last probe", "last reads", "next probe", "why")


def _cells(scheduler: Scheduler, row: Row, now: float) -> tuple[str, ...]:
    from sglang.srt.observability.failed_session_rows import seconds, why

    if row.hangs_since is not None:
        last_probe = f"hangs{f', before that: {row.probe_said}' if row.probe_said else ''}"
    else:
        last_probe = f"{row.probe_said}, {seconds(now - row.probed_at)} ago" if row.probe_said else "-"
    next_probe = "-"
    if row.next_at is not None and row.hangs_since is None:
        next_probe = f"in {seconds(row.next_at - now)}" if row.next_at > now else "now"
    cells = (
        _name(scheduler),
        printable(row.session),
        seconds(now - row.since) if row.blacklisted else "-",
        str(row.refused),
        printable(last_probe, table.LONGEST_CELL),
        printable(row.reads_said, table.LONGEST_CELL) or "-",
        next_probe,
    )
    reason = printable(why(row, scheduler.can_probe, now))
    return (*cells, table.coloured(reason, table.YELLOW if row.blacklisted else None))


def _facts(scheduler: Scheduler, row: Row, now: float) -> dict[str, object]:
    """A row for scripts; moments are given as seconds ago or seconds from now."""
    from sglang.srt.observability.failed_session_rows import why

    def until(moment: float | None) -> float | None:
        return None if moment is None else round(max(0.0, moment - now), 3)

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(now - moment, 3)

    return {
        "pid": scheduler.pid,
        "uid": scheduler.uid,
        "rank": scheduler.rank,
        "written_s_ago": since(scheduler.written_at),
        "session": row.session,
        "blacklisted": row.blacklisted,
        "out_s": since(row.since) if row.blacklisted else None,
        "refused": row.refused,
        "last_probe": row.probe_said or None,
        "last_probe_s_ago": since(row.probed_at) if row.probe_said else None,
        "probe_hangs_for_s": since(row.hangs_since),
        "last_reads": row.reads_said or None,
        "next_probe_in_s": until(row.next_at),
        "held_for_s": until(row.held_until) if row.blacklisted else None,
        "on_probation_for_s": None if row.blacklisted else until(row.ends_at),
        "why": why(row, scheduler.can_probe, now),
    }
