"""Does a test go red for each mechanism that is switched off? Breaks them one after another in a copy of the tree.

    python tools/break_mechanisms.py [WORD ...]     all of them, or those whose name has one of the words

Run it with the python of the environment `engines`. It says which test went red, and exits with 1 if none did.
test/unit/test_break_mechanisms.py sees that each of them can still be broken as it says here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "python"))

import sglang_failed_session_probe
from sglang.srt import environ
from sglang.srt.disaggregation.mooncake import conn, hung_call, late_bytes, rdma_waits, session_probe, tent_probe
from sglang.srt.disaggregation.mooncake.conn import _FailedSessionProber as Prober
from sglang.srt.disaggregation.mooncake.failed_sessions import FailedSessions
from sglang.srt.disaggregation.mooncake.late_bytes import LateBytes
from sglang.srt.disaggregation.mooncake.probe_schedule import Allowance, DueHeap, Places
from sglang.srt.disaggregation.mooncake.probe_workers import Workers
from sglang.srt.disaggregation.mooncake.session_probe import MemoryReader, PendingReads, Reads
from sglang.srt.disaggregation.mooncake.session_states import Rules, Session
from sglang.srt.disaggregation.mooncake.session_watch import Said, SessionWatch
from sglang.srt.observability import failed_session_file as sessions_file
from sglang.srt.observability import failed_session_metrics as metrics
from sglang.srt.observability import failed_session_rows as session_rows
from sglang.srt.observability.failed_session_file import SessionsFile
from sglang.srt.observability.failed_session_log import FailedSessionLog
from sglang.srt.observability.failed_session_metrics import FailedSessionMetrics
from sglang_failed_session_probe import __main__, harmless_logger, own_files, patch, sessions, status
from sglang_failed_session_probe.harmless_logger import HarmlessLogger
from sglang_failed_session_probe.printable import printable, printable_repr

COPIED = ("python", "test", "tools", "pyproject.toml")
# The rules of the bench and the router are no tests of a mechanism, and neither is copied; nor is this file's own test.
NOT_COPIED = ("__pycache__", "test_bench_rules.py", "test_router.py", "test_break_mechanisms.py")
UNIT, FAULTS = "test/unit", "test/faults"
CONN_TESTS, EXIT_TESTS, METRICS_TESTS, LOG_TESTS, PATCH_TESTS, PROBE_TESTS, HUNG_CALL_TESTS, WORKER_TESTS = (
    f"{UNIT}/test_{name}.py"
    for name in ("conn", "exit", "metrics", "log", "patch", "session_probe", "hung_call", "probe_workers")
)
RDMA_WAITS_TESTS = f"{UNIT}/test_rdma_waits.py"
LATE_BYTES_TESTS = f"{UNIT}/test_late_bytes_seen.py"
TENT_TESTS = f"{UNIT}/test_tent_probe.py"
SETTINGS_TESTS = f"{UNIT}/test_settings.py"
STATUS_TESTS = "test/commands/test_status.py"
SESSIONS_TESTS = "test/commands/test_sessions.py"
FILE_TESTS = f"{UNIT}/test_failed_session_file.py"
ROWS_TESTS = f"{UNIT}/test_failed_session_rows.py"
DEADLINE_S = 600.0
# Where all unit tests may see it, these run first: most go red there, within seconds.
NEAREST = {
    "session_states.py": "test_session_states.py",
    "session_watch.py": "test_session_states.py",
    "probe_schedule.py": "test_probe_schedule.py",
    "failed_sessions.py": "test_failed_sessions.py",
}


class Break(NamedTuple):
    """One mechanism, the function that has it, how it is switched off there, and tests of which one must go red."""

    mechanism: str
    function: Any
    before: str
    after: str
    tests: str = UNIT

    def broken(self) -> tuple[pathlib.Path, str]:
        """The file of the function, from the top of the checkout, and its text with the mechanism switched off.

        Raises ValueError if the function does not hold what is to be replaced exactly once.
        """
        function = inspect.unwrap(getattr(self.function, "fget", self.function))
        file = pathlib.Path(inspect.getsourcefile(function) or "")
        lines, first = inspect.getsourcelines(function)
        source = "".join(lines)
        if source.count(self.before) != 1:
            found = f"{function.__qualname__} has {self.before!r} {source.count(self.before)} times, not once"
            raise ValueError(f"{self.mechanism}: {found}")
        text = file.read_text().splitlines(keepends=True)
        text[first - 1 : first - 1 + len(lines)] = source.replace(self.before, self.after)
        return file.relative_to(CHECKOUT), "".join(text)


BREAKS = [
    # One session, in the order of session_states.py.
    Break("relapses are counted", Session._hold_after_probation_s, "self.relapses += 1", "self.relapses = 1"),
    Break(
        "failed first uses are counted",
        Session._hold_after_probation_s,
        "self.failed_first_uses += 1",
        "self.failed_first_uses = 1",
    ),
    Break(
        "one that has worked starts over", Session._hold_after_probation_s, "worked = self.uses > 1", "worked = False"
    ),
    Break(
        "work of less than a second is not enough",
        Session._hold_after_probation_s,
        "self.last_used_at - self.used_at >= first_s",
        "True",
    ),
    Break(
        "one that has worked is held for half of INTERVAL at most",
        Session._hold_after_probation_s,
        "settings.interval_s / 2.0",
        "settings.max_interval_s",
    ),
    Break(
        "reads of one that worked unread prove nothing",
        Session._hold_after_probation_s,
        "self.unreadable is not None or",
        "False or",
    ),
    Break(
        "one that worked though its reads had waited need not settle again",
        Session._hold_after_probation_s,
        "or self.late_since is not None",
        "",
    ),
    Break(
        "one that worked unread may fail twice",
        Session._hold_after_probation_s,
        "if worked or self.failed_first_uses > 1:",
        "if True:",
    ),
    Break("one that is read after its probation is not past", Session.is_past, " and self.reads_since is None", ""),
    Break("a probation is as long as any", Session.let_in, "self.requested_at = now", "pass"),
    Break("a failure makes answers before it void", Session.failed, "self.answered_since = self", "self"),
    Break("gap grows with the outage", Session._gap_s, "share_of_outage * (now - self.failed_at)", "0.0"),
    Break(
        "half a second between probes at most",
        Session._gap_s,
        "(now - self.failed_at)), most_s)",
        "(now - self.failed_at)), 1e9)",
    ),
    Break("the gap counts from when it was probed", Session._gap_s, "self.probed_at + gap_s - now", "gap_s"),
    Break(
        "a probe that has not connected soon is ended",
        Session.connects_by,
        "return now + round_trip_s",
        "return math.inf",
    ),
    Break(
        "a short INTERVAL leaves no more time to connect",
        Rules.loop_s,
        "max(30.0, self.settings.interval_s)",
        "self.settings.interval_s",
    ),
    Break("once in 30 s it may take its time", Session.connects_by, "if now >= max(", "if 0 > max("),
    Break(
        "the probe after an answer may take its time, too",
        Session.connects_by,
        " or self.answered_since is not None",
        "",
    ),
    Break(
        "connecting anew is worth while only if the next probe is near",
        Session.connects_by,
        " or self.rules.round_s > 2.0 * round_trip_s",
        "",
    ),
    Break("only who refuses may cut probes short", Session.not_answered, "if not refused:", "if False:"),
    Break("nobody is probed sooner than all can be", Session._gap_s, "max(gap_s, self.rules.round_s)", "gap_s"),
    Break(
        "a long blacklist is no reason to probe in step",
        Session._gap_s,
        "gap_s *= 1.0 +",
        "gap_s *= 1.0 + (self.rules.round_s < 0.5) *",
        f"{UNIT}/test_probe_schedule.py",
    ),
    Break("a held session is probed seldom", Session._probed_in_hold_at, "return min(", "return 0.0 * min("),
    Break(
        "settle",
        Session._next,
        "max(self.answered_since + settings.settle_s, self.hold_ends_at())",
        "self.hold_ends_at()",
    ),
    Break(
        "hold after a relapse",
        Session._next,
        "max(self.answered_since + settings.settle_s, self.hold_ends_at())",
        "self.answered_since + settings.settle_s",
    ),
    Break("probed while it settles for long", Session._next, "min(ready_at, now + self.rules.interval_s)", "ready_at"),
    Break("verification", Session._next, "if not self.rules.verifying:", "if True:"),
    Break("slow fail-open", Session.read, "if now >= self._opens_at():", "if False:"),
    Break("fail-open in time", Session._read_again, "self._opens_at()", "1e9"),
    Break(
        "fails open though reads are pending",
        Session._why_unverified,
        "if self.reads_since is not None and",
        "if False and",
    ),
    Break(
        "fails open though a call hangs", Session.read_hangs, "if self.answered_since is not None and", "if False and"
    ),
    Break(
        "fail-open grows with relapses",
        Session.opens_after_s,
        "backoff_s(first_s, 2 * self.failed_first_uses, settings.max_interval_s)",
        "first_s",
    ),
    Break("pauses between reads of unreachable peers over RDMA", Rules.turn_to_read_at, "now + 2.0 * takes_s", "now"),
    Break(
        "a session that waits for its turn is shown as waiting",
        session_rows._why_out,
        "if row.turn_at is not None and now < row.turn_at:",
        "if False:",
        ROWS_TESTS,
    ),
    Break("each unreachable peer has a turn in INTERVAL", Rules.turn_to_read_at, ", now + self.interval_s)", ", 1e9)"),
    Break(
        "unreachable peers take turns over RDMA",
        Rules.turn_to_read_at,
        "self.next_turn_at = turn_at + 3.0 * takes_s",
        "",
    ),
    Break(
        "a peer is probed once in INTERVAL between its reads",
        Session._read_again,
        "if at <= max(now, sooner) else ProbeAt(max(now, sooner))",
        "",
    ),
    Break(
        "no such pauses where reads hold up nobody",
        Rules.turn_to_read_at,
        "held_up <= needs_no_pause or ",
        "",
    ),
    Break(
        "no such pauses while there is no other peer",
        Rules.turn_to_read_at,
        " or not self.has_others()",
        "",
    ),
    Break("no such pauses over TCP", Rules.turn_to_read_at, "not self.over_rdma or ", ""),
    Break(
        "one session of an unreachable machine is read",
        SessionWatch._call,
        "if read and known.blacklisted and (until := self._neighbour_is_read_until(known, now)):",
        "if False:",
    ),
    Break(
        "one session of a machine is read, also while there is no other peer",
        SessionWatch._neighbour_is_read_until,
        "self._has_other_machines(known)",
        "self._has_others()",
    ),
    Break(
        "sessions of the only machine are read side by side",
        SessionWatch._neighbour_is_read_until,
        " or not self._has_other_machines(known)",
        "",
    ),
    Break(
        "a machine whose reads have failed waits for its turn",
        SessionWatch._goes_first_until,
        "max(other.turn_at, ",
        "max(0.0, ",
    ),
    Break(
        "reads that never end hold up their machine for INTERVAL",
        SessionWatch._goes_first_until,
        "begun_at + self.rules.interval_s",
        "NEVER",
    ),
    Break(
        "a session that was read longer ago goes first",
        SessionWatch._goes_first_until,
        "max(other.due_at, now + LATER_S) if is_first else 0.0",
        "0.0",
    ),
    Break("a session that registers hands its turn over", SessionWatch.left, "if waiting:", "if False:"),
    Break("on probation no session waits for a turn", SessionWatch._call, "read and known.blacklisted and", "read and"),
    Break("sessions of a readable machine need no turns", Session.needs_no_turn, "self.has_turn = True", "pass"),
    Break(
        "reads that fail just after their machine was readable need no turn",
        Session.read,
        "self.machine_read_at >= began",
        "False",
    ),
    Break(
        "a session takes turns again once its machine was readable",
        Session.read,
        "self.machine_read_at >= began",
        "True",
    ),
    Break(
        "a neighbour that is readable again and again ends one pause",
        Session.neighbour_was_read,
        "if self.machine_read_at is None:",
        "if True:",
    ),
    Break(
        "a session whose probation has passed is no neighbour",
        SessionWatch.failed,
        "            self._forget(session)\n            known = None",
        "            known = None",
    ),
    Break(
        "who has not been read yet is not probed to be let in",
        Session._read_again,
        "if self.unreadable:",
        "if True:",
    ),
    Break("its next turn is another session's", SessionWatch._hand_turn_over, "if not waiting:", "if True:"),
    Break(
        "the only machine's sessions hand over no turns",
        SessionWatch._neighbours_waiting,
        "waiting if waiting and self._has_other_machines(known) else []",
        "waiting",
    ),
    Break(
        "its turn is not lost",
        SessionWatch._hand_turn_over,
        "return known.wait_for_turn(now, known.turn_at + LATER_S)",
        "return known.wait_for_turn(now, known.turn_at + 1e9)",
    ),
    Break(
        "reads on probation change no turns",
        SessionWatch.read,
        "if verdict is Verdict.UNREADABLE and isinstance(decision, (ProbeAt, ReadAt)):",
        "if True:",
    ),
    Break(
        "the session that was read longest ago has the turn",
        SessionWatch._hand_turn_over,
        "key=lambda other: other.read_at",
        "key=lambda other: -other.read_at",
    ),
    Break(
        "a forgotten session holds up no neighbours",
        SessionWatch._forget,
        "neighbours.pop(known, None)",
        "pass",
    ),
    Break("a cleared blacklist holds up no neighbours", SessionWatch.cleared, "self._neighbours.clear()", "pass"),
    Break(
        "one readable session ends the wait of others on its machine",
        SessionWatch.read,
        "other.needs_no_turn(now)",
        "None",
    ),
    Break("late fail-open over RDMA", Session.opens_after_s, "120.0 if self.rules.over_rdma else 0.0", "0.0"),
    Break("settles again after a read that waited", Session._settles_again, "return self", "return False and self"),
    Break(
        "settles again once if nobody looked in time",
        Session._settles_again,
        "verdict is Verdict.READABLE_UNSEEN and self.late_since is None",
        "verdict is Verdict.READABLE_UNSEEN",
    ),
    Break(
        "settles again for half of INTERVAL at most",
        Session._settles_again,
        "and now < self.late_since + longest_s",
        "",
    ),
    Break(
        "reads that waited count no more once nothing can land",
        Session._settles_again,
        "not can_land or ",
        "",
    ),
    Break("stays out while the kernel sends bytes again", Session._waits_for_bytes, "return now <", "return now is"),
    Break(
        "bytes are waited for as long as a loop takes",
        Session._waits_for_bytes,
        "now < self.bytes_since + self.rules.loop_s",
        "True",
    ),
    Break("its time does not begin anew", Session._waits_for_bytes, "if self.bytes_since is None:", "if True:"),
    Break(
        "a bad moment takes back nothing that was learnt of bytes",
        Session._hold_after_probation_s,
        "            self.bytes_mislead",
        "        self.bytes_mislead",
    ),
    Break("bytes that mislead are not waited for", Session._waits_for_bytes, " or self.bytes_mislead:", ":"),
    Break(
        "without SETTLE no bytes are waited for",
        Session._waits_for_bytes,
        "self.rules.settings.settle_s == 0 or ",
        "",
    ),
    Break(
        "that bytes may land says nothing about reads",
        Session.let_in,
        "None if self.is_too_soon else unverified",
        "unverified",
    ),
    Break("an outage begins without the last one's bytes", Session._begin_outage, "self.is_too_soon = self", "self"),
    Break("the transport is found out", Prober.run, "if _session_probe.is_over_rdma():", "if False:", CONN_TESTS),
    Break(
        "pause after a failed read",
        Session._pause_s,
        "return min(pause_s, max(least_s, self.rules.interval_s))",
        "return 0.0",
    ),
    Break(
        "longer pauses for a peer that was gone",
        Session._pause_s,
        "if self.was_gone and self.answered_since is not None:",
        "if False:",
    ),
    Break(
        "reads that nobody waits for any more change nothing", Session.read, "if self.reads_since is None:", "if False:"
    ),
    Break(
        "reads prove nothing only after two probations",
        Session._read_on_probation,
        "if self.still_unreadable:",
        "if True:",
    ),
    Break(
        "verification switched off when reads prove nothing",
        Session._read_on_probation,
        "if self.still_unreadable:",
        "if False:",
    ),
    Break(
        "a whole probation unread is work unread",
        Session._read_on_probation,
        "self.still_unreadable = self.reads_mislead = True",
        "self.still_unreadable = True",
    ),
    Break(
        "nobody is let in unverified while its probe hangs",
        SessionWatch._carry_out,
        "not unverified or call is None or call.answered",
        "True",
    ),
    Break(
        "a failure begins the proof anew",
        Session.let_in,
        "self.still_unreadable = False",
        "self.still_unreadable = getattr(self, 'still_unreadable', False)",
    ),
    Break("one read at the end of a probation", Session.probation_ends, "            self.reads_since = now\n", ""),
    Break(
        "reads that hang at the end of a probation",
        Session.probation_ends,
        "        return self._read_on_probation(now, Verdict.UNREADABLE)\n",
        "        return None\n",
    ),
    Break("no read proves nothing", Session.probation_ends, " or self.read_at < self.reads_since", ""),
    Break("one use proves nothing", Session.probation_ends, "self.uses < 2 or", ""),
    Break(
        "longer probation for slow transfers",
        Session.ends_at,
        "max(1.0, self.rules.transfer_timeout_s / TRANSFER_TIMEOUT_S)",
        "1.0",
    ),
    Break("hold forgotten after a quiet spell", Session.is_past, "is_over or", ""),
    Break("registration ends probation", Session.is_past, "or registration is not self.registration", ""),
    Break("the data path is read in each outage", Session._begin_outage, "self.unreadable = self", "self"),
    # All sessions.
    Break("generation check", SessionWatch._come_back, "if known.generation != call.generation:", "if False:"),
    Break("generation check, of reads", SessionWatch.waits_for, "and known.generation == call.generation", ""),
    Break("one call to a session at a time", SessionWatch.take_due, "or known.id in self._in_flight:", ":"),
    Break(
        "in the order in which it fell due",
        DueHeap.probe_at,
        "Entry(at, next(self._ties), session, False)",
        "Entry(at, -next(self._ties), session, False)",
    ),
    Break("limit of young calls", Places.free_now, "self.concurrency - len(self._young(now))", "self.most"),
    Break("limit of calls under way", Places.free_now, "self.most - len(self)", "self.most"),
    Break(
        "calls that hang make room for young ones",
        Places._young,
        "now < call.made_at + self.YOUNG_S",
        "True",
    ),
    Break(
        "calls that hang are ended when a place is wanted",
        Places.oldest_hanging,
        "if len(self) < self.most:",
        "if True:",
    ),
    Break(
        "none is ended while there is a place",
        Places.oldest_hanging,
        "        if len(self) < self.most:\n            return []\n",
        "",
    ),
    Break(
        "calls whose reads hang are ended",
        SessionWatch._look_at_call,
        "self._to_end.append(call)\n        if",
        "if",
    ),
    Break(
        "a probe from before a failure that hangs is ended",
        SessionWatch._look_at_call,
        "[call] if now >= end_at else []",
        "[]",
    ),
    Break(
        "a probe from before a failure, with reads to follow, is ended too",
        SessionWatch._look_at_call,
        "not call.answered:",
        "not call.read:",
    ),
    Break(
        "reads that hang leave places",
        SessionWatch._reads_in_the_way,
        "reading if len(reading) >= self.places.most_reading else []",
        "[]",
    ),
    Break("reads of one session leave places", SessionWatch._reads_in_the_way, "if len(own) > 1", "if False"),
    Break(
        "a call that was ended in vain is waited for no longer",
        SessionWatch._call,
        " and now < call.returns_by",
        "",
    ),
    Break("a call that was just ended is waited for", SessionWatch.to_end, "now + READ_HANGS_S", "call.made_at"),
    Break(
        "a probe that keeps its session out is ended",
        SessionWatch._carry_out,
        "self._to_end.append(call)",
        "pass",
    ),
    Break("bytes are forgotten when reads fail", Session.read, "self.is_too_soon = False", "pass"),
    Break("reads that are in the way are ended", SessionWatch._call, "self._to_end += [", "_ = ["),
    Break(
        "pending reads leave no entries an INTERVAL ahead",
        Session._next,
        "min(max(10.0, self.rules.round_s), self.rules.interval_s)",
        "self.rules.interval_s",
    ),
    Break("a probe that hangs is no read that hangs", SessionWatch._look_at_call, "not call.answered or", ""),
    Break("350 calls a second at most", Allowance.spend, "self._left -= 1.0", "pass"),
    Break(
        "the allowance covers a batch",
        Allowance.renew,
        "max(self.AT_ONCE, 2.0 * self.batch_s() * self._per_s)",
        "self.AT_ONCE",
    ),
    Break("the allowance covers what a late daemon thread has missed", Allowance.renew, "2.0 * self", "self"),
    Break("a long blacklist is probed in long batches", Allowance.batch_s, ", 0.3)", ", 0.0)"),
    Break(
        "more calls for INTERVAL",
        Allowance.renew,
        "max(self.PER_S, 1.05 * blacklisted / self._interval_s)",
        "self.PER_S",
    ),
    Break(
        "idle sessions are forgotten",
        SessionWatch._come_up,
        "            self._drop(known, now)\n",
        "            pass\n",
    ),
    Break("ends are looked at in time", SessionWatch._check_end, ", now + latest_s)", ", now + 1e9)"),
    Break("malformed ids are never probed", SessionWatch.failed, "if is_session_id(session):", "if True:"),
    Break(
        "a bounded number of sessions under the lock",
        SessionWatch.take_due,
        "for _ in range(BATCH):",
        "for _ in range(10**9):",
    ),
    Break("a failure wakes the loop", SessionWatch.failed, "        self._wake()\n", ""),
    Break("the loop hears of a registration", SessionWatch.left, "            self._wake()", "            pass"),
    Break("an unreadable peer is told once", SessionWatch.read, "and known.unreadable is None:", ":"),
    Break("each is looked at once whether it has connected", Places.not_connected, "call.connects_by = NEVER", "pass"),
    Break(
        "the loop wakes for a probe that has not connected",
        SessionWatch.next_due_in,
        "        at = min(at, self.places.connects_by())\n",
        "",
    ),
    Break("told once that a peer cuts probes short", SessionWatch.answered, "known.listen_at = NEVER", "pass"),
    Break(
        "looks three times a second at most",
        SessionWatch._call,
        ", self._listen_at)",
        ")",
    ),
    Break(
        "registration takes off the blacklist",
        FailedSessions.discard,
        "        self._tell(self._listener.left, session)\n",
        "",
    ),
    Break(
        "a fault of the listener stops nothing", FailedSessions._tell, "except Exception:", "except ZeroDivisionError:"
    ),
    # Through the engine.
    Break("four reads", MemoryReader.begin, "for _ in range(self.reads_at_a_time))", "for _ in range(1))", PROBE_TESTS),
    Break(
        "read until one waits",
        MemoryReader.begin,
        "if goes_on and self.reads_at_a_time > 1:",
        "if False:",
        PROBE_TESTS,
    ),
    Break(
        "read until one waits, real engines",
        MemoryReader.begin,
        "if goes_on and self.reads_at_a_time > 1:",
        "if False:",
        f"{FAULTS}/test_registration.py",
    ),
    Break(
        "no read without a fresh answer",
        Prober._make,
        "is_read = call.read and call.answered and",
        "is_read = call.read and",
    ),
    Break("late is what was seen pending", Reads.look, "self._late |= not in_time", "pass", PROBE_TESTS),
    Break("what nobody looked at in time may be late", Reads.look, "if in_time else", "if True else", PROBE_TESTS),
    Break(
        "a batch is looked at until it ends",
        PendingReads.look,
        "if not reads.have_ended():",
        "if verdict is None:",
        PROBE_TESTS,
    ),
    Break("looks at growing gaps", PendingReads._gap_s, "self._SHARE_OF_AGE * reads.age_s()", "0.0", PROBE_TESTS),
    Break("reads are told once", PendingReads.look, "and not was_told", "", PROBE_TESTS),
    Break("threads are looked at over RDMA alone", PendingReads.look, "self.over_rdma and ", "", PROBE_TESTS),
    Break(
        "no thread is looked at while no read is pending",
        PendingReads.look,
        "self.over_rdma and self._looks and",
        "self.over_rdma and",
        PROBE_TESTS,
    ),
    Break(
        "the kernel is asked before the probe that reads follow",
        Prober._make,
        "call.read and self._bytes_may_land(call.session)",
        "False",
        CONN_TESTS,
    ),
    Break(
        "over RDMA the kernel is not asked",
        Prober._bytes_may_land,
        " and not self.watch.rules.over_rdma",
        "",
        CONN_TESTS,
    ),
    Break(
        "without SETTLE the kernel is not asked",
        Prober._bytes_may_land,
        "self._settings.settle_s > 0 and ",
        "",
        CONN_TESTS,
    ),
    Break(
        "a fault of the look keeps nobody out",
        Prober._bytes_may_land,
        "except Exception as fault:",
        "except ZeroDivisionError as fault:",
        CONN_TESTS,
    ),
    Break(
        "a fault of the reader keeps nobody out",
        Prober._begin_reads,
        "except Exception as fault:",
        "except ZeroDivisionError as fault:",
        CONN_TESTS,
    ),
    Break(
        "reads that work too soon let nobody in",
        Reads.look,
        "if self.too_soon and",
        "if False and",
        PROBE_TESTS,
    ),
    Break(
        "a connection that was closed counts",
        LateBytes._ports,
        "inode == 0 or inode in own",
        "inode in own",
        LATE_BYTES_TESTS,
    ),
    Break(
        "what other processes send does not count",
        LateBytes._ports,
        "inode == 0 or inode in own",
        "True",
        LATE_BYTES_TESTS,
    ),
    Break(
        "a request to read does not count", LateBytes._ports, "to_send >= self._LEAST_BYTES", "True", LATE_BYTES_TESTS
    ),
    Break(
        "a name that is no text hides nothing",
        late_bytes._own_sockets,
        "status.read()",
        "status.read().decode().encode()",
        LATE_BYTES_TESTS,
    ),
    Break("a closed window does not count", LateBytes._ports, "timer == _SENDS_AGAIN and", "", LATE_BYTES_TESTS),
    Break("what is sent once does not count", LateBytes._ports, " and again:", ":", LATE_BYTES_TESTS),
    Break("messages do not count", LateBytes.may_land, "set(self._other_ports())", "set()", LATE_BYTES_TESTS),
    Break(
        "to which ports messages go is known",
        conn._other_ports,
        'getattr(registration, "dst_port", None)',
        "None",
        CONN_TESTS,
    ),
    Break(
        "handshakes do not count",
        conn._other_ports,
        '{int(session.rpartition(":")[2]) for session in sessions}',
        "set()",
        CONN_TESTS,
    ),
    Break(
        "the kernel is asked four times a second",
        LateBytes._look,
        "self._clock() >= until",
        "True",
        LATE_BYTES_TESTS,
    ),
    Break(
        "looks that take long are made less often",
        LateBytes._look,
        "max(self.LOOK_EVERY_S, self.PAUSE_PER_CPU_S * took_s)",
        "self.LOOK_EVERY_S",
        LATE_BYTES_TESTS,
    ),
    Break("but once a second", LateBytes._look, "self.LONGEST_PAUSE_S)", "1e9)", LATE_BYTES_TESTS),
    Break(
        "the kernel tells of IPv6 when it is asked for that",
        LateBytes.may_land,
        "socket.AF_INET if ip.version == 4 else socket.AF_INET6",
        "socket.AF_INET",
        LATE_BYTES_TESTS,
    ),
    Break(
        "threads are looked at twice a second",
        PendingReads.look,
        " and now >= self._sample_at",
        "",
        PROBE_TESTS,
    ),
    Break(
        "what is not known counts as waiting",
        Reads.held_up,
        "if self.samples else 1.0",
        "if self.samples else 0.0",
        PROBE_TESTS,
    ),
    Break(
        "a thread that waits for a peer's handshake is seen",
        rdma_waits.a_thread_waits,
        " or waits_for_one_of(line, sessions, machine)",
        "",
        RDMA_WAITS_TESTS,
    ),
    Break(
        "a call to the driver is known by its number",
        rdma_waits._is_in_driver,
        "words[0] not in DRIVER_CALLS[machine]",
        "False",
        RDMA_WAITS_TESTS,
    ),
    Break(
        "the driver is that of an RDMA device",
        rdma_waits._is_in_driver,
        ".startswith(DEVICE_FILES)",
        ".startswith('/')",
        RDMA_WAITS_TESTS,
    ),
    Break(
        "a refused page is registered later",
        MemoryReader._has_page,
        "self._clock() < self._refused_at + self._REGISTER_AGAIN_S",
        "self._refused_why",
        PROBE_TESTS,
    ),
    Break("a refused page is said once", MemoryReader._has_page, "if not was_refused:", "if True:", PROBE_TESTS),
    Break(
        "one page for one reader after another",
        MemoryReader._has_page,
        "_page_is_registered_with[id(mooncake)] = _reference_to(mooncake)",
        "pass",
        PROBE_TESTS,
    ),
    Break(
        "engines of any kind are read", session_probe._reference_to, "except TypeError", "except OSError", PROBE_TESTS
    ),
    Break(
        "a page that is not deregistered stays known",
        MemoryReader.close,
        "mooncake.unregister_memory(_PAGE) == 0",
        "[mooncake.unregister_memory(_PAGE)]",
        PROBE_TESTS,
    ),
    Break("the page is deregistered at a stop", Prober.run, "self._reader.close(", "bool(", CONN_TESTS),
    Break(
        "a page stays while reads are pending",
        Prober._is_reading,
        "self._pending.next_look_in() is not None or ",
        "",
        CONN_TESTS,
    ),
    Break(
        "a page stays while a call reads",
        Prober._is_reading,
        " or any(call.read for call in list(self.watch.places))",
        "",
        CONN_TESTS,
    ),
    Break("a page stays while another manager reads", Prober.run, "list(_probers) if", "[self] if", CONN_TESTS),
    Break(
        "a page that was read into at a stop stays for good",
        MemoryReader.close,
        "_page_stays_with.add(id(mooncake))",
        "return",
        PROBE_TESTS,
    ),
    Break("no teardown waits for a page", MemoryReader.close, "acquire(blocking=False)", "acquire()", PROBE_TESTS),
    Break("nobody is probed after a stop", Prober._make, "if self.shutdown.is_set():", "if False:", CONN_TESTS),
    Break(
        "a probe that was not made is not counted",
        Prober._hand_over,
        "if answer.rc is not None or answer.error is not None",
        "if True",
        CONN_TESTS,
    ),
    Break("threads that have ended are forgotten", Workers._work, "self._threads.discard(", "bool(", WORKER_TESTS),
    Break("nothing is read after a stop", Prober._make, " and not self.shutdown.is_set()", "", CONN_TESTS),
    Break("managers stop side by side", conn._stop_probers, "prober.shutdown.set()", "pass", CONN_TESTS),
    Break(
        "a folder that cannot be looked through stops no start",
        sessions_file.remove_dead,
        "suppress(OSError)",
        "suppress(KeyError)",
        FILE_TESTS,
    ),
    Break(
        "a thread that cannot be made is an answer",
        Workers._start_next,
        "except Exception as error",
        "except OSError as error",
        WORKER_TESTS,
    ),
    Break(
        "a call without memory is an answer",
        Workers._work,
        "made, answer.error = answer, error",
        "made = Answer(answer.call, error=error)",
        WORKER_TESTS,
    ),
    Break(
        "unknown addresses fail nothing",
        MemoryReader._address_of,
        "contextlib.suppress(Exception)",
        "contextlib.suppress(ZeroDivisionError)",
        PROBE_TESTS,
    ),
    Break(
        "a peer that is gone is not said to cut probes short",
        session_probe.probe_and_listen,
        " or not _takes_connections(session)",
        "",
        PROBE_TESTS,
    ),
    Break(
        "a peer that is stopped is not said to cut probes short",
        session_probe.probe_and_listen,
        "rc == NO_ANSWER and time.monotonic() - began <= REFUSED_WITHIN_S",
        "rc == NO_ANSWER",
        PROBE_TESTS,
    ),
    Break("a stuck queue is named as a cause", FailedSessionLog._fields, "self._other_cause", '""', LOG_TESTS),
    Break("a long queue is no cause", session_probe.has_short_queue, "not is_long and", "", PROBE_TESTS),
    Break("no probe that ends the process", session_probe.probe, " or tent_probe.why_no_probe()", "", TENT_TESTS),
    Break("no reads on TENT", Prober.__init__, " or _tent_probe.is_on()", "", TENT_TESTS),
    Break(
        "no trial for TENT under the lock",
        conn._prober_of,
        "    _session_probe.can_probe(manager.engine)",
        "",
        TENT_TESTS,
    ),
    Break("no trial without TENT", tent_probe._has_namespace, " >= 0", " >= -1", TENT_TESTS),
    Break(
        "a trial that hangs ends", tent_probe.why_no_probe, "            timeout=_CHILD_DEADLINE_S,\n", "", TENT_TESTS
    ),
    Break("a trial sees no GPU", tent_probe.why_no_probe, "**_CHILD_ENVIRONMENT", "", TENT_TESTS),
    Break("a trial that cannot be made is none", tent_probe.why_no_probe, " if ended else", " if 0 else", TENT_TESTS),
    Break("the same wait after the copy", hung_call.end_call, "wait_of(thread) != wait or", "", HUNG_CALL_TESTS),
    Break("the same call after the copy", hung_call.end_call, "not is_in_call() or", "", HUNG_CALL_TESTS),
    Break(
        "only connections to the peer",
        hung_call.end_call,
        "or not _may_be_of(connection, session)",
        "",
        HUNG_CALL_TESTS,
    ),
    Break(
        "one that is connected may hang on",
        hung_call.end_call,
        "only_connecting and not _is_connecting(connection)",
        "False",
        HUNG_CALL_TESTS,
    ),
    Break(
        "a call that hangs holds up none of those started with it",
        Workers.start,
        "        while self._waiting:\n            self._start_next()\n",
        "",
        WORKER_TESTS,
    ),
    # The daemon thread.
    Break("generation check, on a plain set", conn._run_bare_pass, "failures.get(session) is counts[session]", "True"),
    Break(
        "no engine call under the lock",
        Prober._start_due,
        "        workers.start(calls)\n",
        "        with self._lock:\n            for call in calls:\n                self._inbox.put(self._make(call))\n",
    ),
    Break("the loop stops at shutdown", Prober.run, "while not self.shutdown.is_set():", "while True:"),
    Break(
        "no new calls after shutdown",
        Prober._start_due,
        "[] if stopped else self.watch.take_due(due_by)",
        "self.watch.take_due(due_by)",
    ),
    Break(
        "the daemon thread ends what has not connected",
        Prober._start_due,
        "        _end_calls(not_connected, only_connecting=True)\n",
        "",
        CONN_TESTS,
    ),
    Break(
        "a pass over a plain object sleeps after a shutdown, too",
        conn._run_bare_pass,
        "None if shutdown.is_set() else ",
        "",
        CONN_TESTS,
    ),
    Break("stop at exit", conn._register_hooks, "    atexit.register(_stop_probers)\n", "", EXIT_TESTS),
    Break("one hook for all managers", conn._register_hooks, "@functools.cache", "", CONN_TESTS),
    Break(
        "a stopped prober is collected",
        conn._register_hooks,
        "    atexit.register",
        "    _probers.add = set().add\n    atexit.register",
        CONN_TESTS,
    ),
    Break(
        "reads that are about to end are waited for",
        Prober._wind_up,
        " and not (in_grace and self._pending.next_look_in() is not None)",
        "",
        CONN_TESTS,
    ),
    Break(
        "calls that hang are ended at a stop",
        Prober._wind_up,
        "                    _end_calls(list(self.watch.places))\n",
        "                    pass\n",
        f"{FAULTS}/test_exits.py",
    ),
    Break(
        "a thread whose call cannot be ended sleeps until the exit",
        Prober.stop_at_exit,
        "            _hold_threads_that_terminate()\n",
        "            pass\n",
        EXIT_TESTS,
    ),
    Break(
        "the next batch begins at once while more is due",
        SessionWatch.next_due_in,
        "        if at <= now:\n            return 0.0\n",
        "",
        CONN_TESTS,
    ),
    Break(
        "a pass by hand probes all that is due",
        Prober.run_pass,
        "left > 0 and self.watch.waits_for_allowance() and not self.shutdown.is_set()",
        "False",
        CONN_TESTS,
    ),
    Break(
        "references are counted under the lock",
        conn._missing_of,
        "    with manager.session_lock:\n",
        "    if True:\n",
        CONN_TESTS,
    ),
    Break(
        "a lock that somebody has wrapped is a lock",
        conn._missing_of,
        'not hasattr(type(manager.session_lock), "__exit__")',
        'type(manager.session_lock).__name__ != "lock"',
        PATCH_TESTS,
    ),
    Break(
        "a second name is refused",
        conn._missing_of,
        "sys.getrefcount(manager.failed_sessions) > 2",
        "False",
        PATCH_TESTS,
    ),
    Break(
        "a session whose answer was lost is probed again",
        Prober._hand_over,
        "                    self.watch.lost(answer.call)\n",
        "",
    ),
    Break(
        "a lost answer costs no other answer",
        Prober._hand_over,
        "                except Exception as raised:  # the other",
        "                except ZeroDivisionError as raised:  # the other",
    ),
    Break(
        "calls that a fault kept from being made are made after it",
        Prober.run,
        "self.watch.calls_lost()",
        "pass",
        CONN_TESTS,
    ),
    Break(
        "session_lock is taken anew for each read that ended",
        Prober._hand_over,
        "        for call, verdict, reads in shown:\n            with self._lock:",
        "        with self._lock:\n            for call, verdict, reads in shown:",
        CONN_TESTS,
    ),
    Break(
        "idle threads beyond concurrency end",
        Prober.run,
        "keep=0 if wait_s is None else self._settings.concurrency",
        "keep=0 if wait_s is None else 10**9",
    ),
    Break(
        "the plain set comes back if the probe cannot start",
        conn._start_failed_session_probe,
        "manager.failed_sessions = set(manager.failed_sessions)",
        "pass",
    ),
    Break(
        "log lines are summed up before a long wait",
        Prober.run,
        "                    self._log.sum_up(at_once=True)  # it may",
        "                    pass  # it may",
        CONN_TESTS,
    ),
    Break(
        "session_lock is free after a fork",
        conn._register_hooks,
        "    os.register_at_fork(after_in_child=_free_locks)\n",
        "",
        f"{FAULTS}/test_processes.py",
    ),
    Break(
        "a fault while the loop stops leaves nothing in the gauges",
        Prober.run,
        "        except Exception as fault:\n            self._say_fault(fault)\n        self.metrics.stop()\n",
        "        finally:\n            pass\n        self.metrics.stop()\n",
        CONN_TESTS,
    ),
    Break(
        "a manager that cannot be looked at stops no node",
        conn._with_failed_session_probe,
        "        try:\n            missing = _missing_of(self)\n",
        "        missing = _missing_of(self)\n        try:\n",
        CONN_TESTS,
    ),
    # Settings.
    Break(
        "a setting is a plain decimal number",
        environ._probe_seconds,
        "_PROBE_SECONDS.fullmatch(value)",
        'not set(value) - set("0123456789._eE-")',
        SETTINGS_TESTS,
    ),
    Break(
        "an interval too small to divide by is refused",
        environ._probe_seconds,
        "(0 if zero_allowed else _PROBE_LEAST_S) <=",
        "(0 if zero_allowed else 5e-324) <=",
        SETTINGS_TESTS,
    ),
    Break(
        "CONCURRENCY has an upper bound",
        environ._probe_count,
        "digits and int(digits[1]) <= _PROBE_MOST",
        "digits",
        SETTINGS_TESTS,
    ),
    Break(
        "a value is cut where it is refused",
        environ._probe_setting_refused,
        "{_probe_printable_repr(value)}",
        "{value!r}",
        SETTINGS_TESTS,
    ),
    # What is told.
    Break(
        "a log that raises stops nothing",
        HarmlessLogger.log,
        "except BaseException as fault:",
        "except ZeroDivisionError as fault:",
        CONN_TESTS,
    ),
    Break("what is logged is escaped", HarmlessLogger.log, "*map(_shown, arguments)", "*arguments", LOG_TESTS),
    Break("unprintable characters are escaped", printable, "cut.isprintable()", "True", LOG_TESTS),
    Break("long text is cut", printable, "text[:most]", "text", LOG_TESTS),
    Break("lines of a traceback are indented", harmless_logger._shown, '"\\n  ".join', '"\\n".join', LOG_TESTS),
    Break(
        "labels do not break the table", status._row, "printable(probes, table.LONGEST_CELL)", "probes", STATUS_TESTS
    ),
    Break(
        "numbers that overflow are not read from a page",
        status._whole,
        "abs(value) < _BEYOND_COUNTING",
        "math.isfinite(value)",
        STATUS_TESTS,
    ),
    Break("a page without end is not read to it", status._page, "read(_MOST_BYTES + 1)", "read()", STATUS_TESTS),
    Break(
        "where wrapt is found later the patch comes later",
        sglang_failed_session_probe.activate,
        "sys.meta_path.insert(0, _WithSGLang)",
        "raise",
        PATCH_TESTS,
    ),
    Break(
        "without our files SGLang's are not taken for ours",
        own_files.source_folder,
        ' or (beside / "sglang" / "__init__.py").exists()',
        "",
        PATCH_TESTS,
    ),
    Break(
        "a closed stream is no fault",
        __main__._open_streams,
        "if stream is None",
        "if False",
        "test/commands/test_main.py::test_a_closed_stream_is_no_fault",
    ),
    Break(
        "another service is not taken for none",
        status._read,
        " and not hung_up:",
        " and False:",
        STATUS_TESTS,
    ),
    Break(
        "a signal is heard while a line is logged",
        HarmlessLogger.log,
        "                raise  # a",
        "                pass  # a",
        CONN_TESTS,
    ),
    Break(
        "an object whose repr() raises stops nothing",
        printable_repr,
        "except Exception:",
        "except ZeroDivisionError:",
        PROBE_TESTS,
    ),
    Break(
        "deactivate() goes on where somebody has removed an attribute",
        patch.Patch.take_back,
        "contextlib.suppress(Exception)",
        "contextlib.nullcontext()",
        PATCH_TESTS,
    ),
    Break(
        "raising probes are said once",
        FailedSessionLog.probe_raised,
        "not self._raising.is_new(session)",
        "False",
        LOG_TESTS,
    ),
    Break(
        "only the latest sessions are remembered for which something was logged",
        Said.is_new,
        "len(self._latest) > SAID_LIMIT",
        "False",
        LOG_TESTS,
    ),
    Break(
        "a session for which something is logged again is remembered anew",
        Said.is_new,
        "        self._latest.move_to_end(said)\n",
        "",
        LOG_TESTS,
    ),
    Break("log lines are summed up", FailedSessionLog._say, "if spell.said < LINES_IN_A_SPELL:", "if True:", LOG_TESTS),
    Break(
        "left out log lines are counted",
        FailedSessionLog.sum_up,
        "if spell.left_out and (over or (at_once and not spell.summed_up)):",
        "if False:",
        LOG_TESTS,
    ),
    Break("summed up once a spell", FailedSessionLog.sum_up, "(at_once and not spell.summed_up)", "at_once", LOG_TESTS),
    Break(
        "gauges of dead processes, at a start",
        FailedSessionMetrics.start,
        "            _forget_dead_processes()\n",
        "            pass\n",
        METRICS_TESTS,
    ),
    Break(
        "gauges of dead processes, at a blacklisting",
        FailedSessionMetrics.heard,
        "self._dead_may_be_left = True",
        "pass",
        METRICS_TESTS,
    ),
    Break("gauges begin at 0", metrics._with_file_of_its_own, "made.set(0)", "pass", METRICS_TESTS),
    Break("gauges in files of our own", metrics._with_file_of_its_own, "_our_values()", "usual", METRICS_TESTS),
    Break(
        "a live process holds a lock on its gauges",
        metrics._claimed,
        "        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        METRICS_TESTS,
    ),
    Break(
        "only a process whose lock is free is dead",
        metrics._forget_dead_processes,
        "            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        METRICS_TESTS,
    ),
    Break(
        "a process does not release its own lock",
        metrics._forget_dead_processes,
        "if name == own:",
        "if False:",
        METRICS_TESTS,
    ),
    Break(
        "files of another machine's gauges are left alone",
        metrics._forget_dead_processes,
        '"*-{_boot()}"',
        '"*"',
        METRICS_TESTS,
    ),
    Break(
        "the usual files for all other metrics",
        metrics._with_file_of_its_own,
        "        values.ValueClass = usual\n",
        "        pass\n",
        METRICS_TESTS,
    ),
    Break("gauges end at 0", Prober.run, "        self.metrics.stop()\n", "", METRICS_TESTS),
    Break("gauges add up", metrics._gauge, 'multiprocess_mode="livesum"', 'multiprocess_mode="livemax"', METRICS_TESTS),
    Break(
        "metrics are there from the start",
        conn._start_failed_session_probe,
        "prober.metrics.start(",
        "id(",
        METRICS_TESTS,
    ),
    Break(
        "a metric that fails stops nothing",
        metrics.harmless,
        "    except Exception:\n",
        "    except KeyError:\n",
        METRICS_TESTS,
    ),
    Break(
        "a metric is registered once",
        metrics._LazyMetric.register,
        "        if self._metric is None:\n            with self._lock:\n                if self._metric is None:",
        "        if True:\n            with self._lock:\n                if True:",
        METRICS_TESTS,
    ),
    # What the command sessions shows.
    Break(
        "nothing is written while nothing is blacklisted",
        SessionsFile.write_if_due,
        "if not blacklisted and not self._is_out_of_date:",
        "if False:",
        FILE_TESTS,
    ),
    Break("written once a second at most", SessionsFile.write_if_due, "now >= self._next_at", "True", FILE_TESTS),
    Break(
        "a file that takes long to write is written less often",
        SessionsFile.write_if_due,
        "gap_per_write * (self._cpu_clock() - began)",
        "0.0",
        FILE_TESTS,
    ),
    Break(
        "what happened soon after a write is written, too",
        SessionsFile.write_if_due,
        "        self._is_out_of_date = True\n",
        "",
        FILE_TESTS,
    ),
    Break(
        "the file is written once more when the blacklist is empty",
        SessionsFile.write_if_due,
        "            self._is_out_of_date = blacklisted\n",
        "            self._is_out_of_date = False\n",
        FILE_TESTS,
    ),
    Break(
        "a file that cannot be written stops nothing",
        SessionsFile.write_if_due,
        "except Exception as fault:",
        "except KeyError as fault:",
        FILE_TESTS,
    ),
    Break(
        "where the first folder cannot be written, the next is used",
        SessionsFile._write,
        "in folders():",
        "in folders()[:1]:",
        FILE_TESTS,
    ),
    Break("a live scheduler holds a lock on its file", SessionsFile._replace, "fcntl.lockf(", "id(", FILE_TESTS),
    Break("a file is replaced in one step", SessionsFile._replace, "file.flush()", "pass", FILE_TESTS),
    Break("a failed write leaves no file", SessionsFile._replace, "_remove(new)", "pass", FILE_TESTS),
    Break("the file has permissions 0600", SessionsFile._replace, "0o600", "0o666", FILE_TESTS),
    Break("its file is gone with a manager", Prober.run, "        self._file.remove()\n", "", FILE_TESTS),
    Break("what dead schedulers left is removed", sessions_file.remove_dead, "read(path)", "pass", FILE_TESTS),
    Break(
        "a scheduler keeps its own lock",
        sessions_file.remove_dead,
        "if path.name not in _own_names:",
        "if True:",
        FILE_TESTS,
    ),
    Break(
        "a file that was replaced is not taken for a dead one",
        sessions_file.read,
        "if os.fstat(descriptor).st_nlink:",
        "if True:",
        FILE_TESTS,
    ),
    Break(
        "a dead scheduler's file is not read", sessions_file.read, "if _is_locked(descriptor):", "if True:", FILE_TESTS
    ),
    Break(
        "a dead scheduler's file of another version is removed",
        sessions_file.read,
        "text.startswith(_BEGINS)",
        "False",
        FILE_TESTS,
    ),
    Break(
        "a file that no scheduler has written is left alone",
        sessions_file.read,
        "text.startswith(_BEGINS)",
        "True",
        FILE_TESTS,
    ),
    Break("no link is followed", sessions_file.read, " | os.O_NOFOLLOW", "", FILE_TESTS),
    Break("opening a pipe does not block", sessions_file.read, " | os.O_NONBLOCK", "", FILE_TESTS),
    Break("no folder is read", sessions_file.read, "if not stat.S_ISREG(found.st_mode):", "if False:", FILE_TESTS),
    Break("no file of another user is read", sessions_file.read, "not in (0, found.st_uid)", "is None", FILE_TESTS),
    Break("no endless file is read", sessions_file.read, "found.st_size > _MOST_BYTES", "False", FILE_TESTS),
    Break("a file with another clock is refused", sessions_file.read, "> time.monotonic() + 1.0", "== 0", FILE_TESTS),
    Break(
        "no other format is read",
        sessions_file._parsed,
        'about.pop("format") != _FORMAT',
        'about.pop("format") is None',
        FILE_TESTS,
    ),
    Break("each field is of its type", sessions_file._parsed, "if not _is_one_of(", "if 0 in (", FILE_TESTS),
    Break(
        "times that overflow are not read from a file",
        sessions_file._is_one_of,
        "not -1e15 < value < 1e15",
        "value is None",
        FILE_TESTS,
    ),
    Break(
        "a session is visible only once it is complete",
        SessionWatch.failed,
        "known = Session(session, self.rules, now)",
        "known = self.known[session] = Session(session, self.rules, now)",
        ROWS_TESTS,
    ),
    Break(
        "what was said before a newer failure is void",
        Session.failed,
        'self.probe_said = self.reads_said = ""',
        "self.probe_said, self.reads_said = (getattr(self, name, '') for name in ('probe_said', 'reads_said'))",
        ROWS_TESTS,
    ),
    Break(
        "the last answer is kept in words for the operator",
        Prober._tell_answer,
        "said=self._in_words(answer)",
        'said=""',
        CONN_TESTS,
    ),
    Break(
        "a probe under way for a moment is not shown as hanging",
        session_rows._row,
        "call.made_at + Places.YOUNG_S",
        "call.made_at",
        ROWS_TESTS,
    ),
    Break("a probation that is over is not shown", session_rows.is_over, "now >= row.ends_at", "False", ROWS_TESTS),
    Break(
        "one wrong file hides nobody",
        sessions._look,
        "except failed_session_file.Unreadable as why:",
        "except KeyError as why:",
        SESSIONS_TESTS,
    ),
    Break(
        "what is read from a file does not break the table",
        sessions._cells,
        "printable(row.session)",
        "row.session",
        SESSIONS_TESTS,
    ),
    Break("old rows are said to be old", sessions._notes, "age_s > _OLD_S", "False", SESSIONS_TESTS),
    # The most important ones once more, on real engines.
    Break(
        "generation check, real engines",
        SessionWatch._come_back,
        "if known.generation != call.generation:",
        "if False:",
        f"{FAULTS}/test_registration.py",
    ),
    Break(
        "verification, real engines",
        Session._next,
        "if not self.rules.verifying:",
        "if True:",
        f"{FAULTS}/test_data_path.py",
    ),
    Break(
        "hold after a relapse, real engines",
        Session._next,
        "max(self.answered_since + settings.settle_s, self.hold_ends_at())",
        "self.answered_since + settings.settle_s",
        f"{FAULTS}/test_flapping.py",
    ),
    Break(
        "calls that hang are ended, real engines",
        Places.oldest_hanging,
        "if len(self) < self.most:",
        "if True:",
        f"{FAULTS}/test_hung_peers.py",
    ),
    Break(
        "settle, real engines",
        Session._next,
        "max(self.answered_since + settings.settle_s, self.hold_ends_at())",
        "self.hold_ends_at()",
        f"{FAULTS}/test_late_bytes.py",
    ),
    Break(
        "bytes that the kernel sends again, real engines",
        LateBytes._ports,
        "to_send >= self._LEAST_BYTES",
        "False",
        f"{FAULTS}/test_late_bytes.py",
    ),
]


def red_test(broken: Break) -> str:
    """The first test that goes red with the mechanism broken; empty if none does."""
    file, text = broken.broken()
    nearest = NEAREST.get(file.name) if broken.tests == UNIT else None
    with copy_of_checkout() as copy:
        (copy / file).write_text(text)
        for tests in [f"{UNIT}/{nearest}", UNIT] if nearest else [broken.tests]:
            if red := red_unbroken(tests):
                sys.exit(f"{tests} is red with nothing broken: {red}")
            if red := red_test_of(copy, tests):
                return red
    return ""


@functools.cache
def red_unbroken(tests: str) -> str:
    """The first of these tests that is red in any case; empty if none is."""
    with copy_of_checkout() as copy:
        return red_test_of(copy, tests)


@contextlib.contextmanager
def copy_of_checkout() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        copy.chmod(0o755)  # some tests run as another user
        for name in COPIED:
            source = CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
            else:
                shutil.copy(source, copy / name)
        yield copy


def red_test_of(copy: pathlib.Path, tests: str) -> str:
    """The first of these tests that goes red in the copy; empty if none does."""
    timeout_s = "20" if tests.startswith(UNIT) else "120"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", timeout_s, tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        return "(the run did not end)"
    reds = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    timed_out = re.findall(r"^.*?(test_\w+\.py).*Timeout", done.stdout + done.stderr, re.MULTILINE)
    return (reds or timed_out or [""])[0] or ("" if done.returncode == 0 else done.stdout[-300:])


def main(words: list[str]) -> int:
    """Breaks what was chosen; 0 if a test went red each time."""
    unseen = 0
    chosen = [broken for broken in BREAKS if not words or any(word in broken.mechanism for word in words)]
    for broken in chosen:
        red = red_test(broken)
        unseen += not red
        print(f"{broken.mechanism}: {red or 'NO TEST GOES RED'}", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
