"""Does a test go red for each mechanism that is switched off? Breaks them one after another in a copy of the tree.

    python tools/break_mechanisms.py [WORD ...]     all of them, or those whose name has one of the words

Run it with the python of the environment `engines`. It says which test went red, and exits with 1 if none did.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("python", "test", "tools", "pyproject.toml")
# The rules of the bench are no test of a mechanism, and the bench is not copied.
NOT_COPIED = ("__pycache__", "test_bench_rules.py")
FOLDER = "python/sglang/srt/disaggregation/mooncake"
SESSIONS, PROBE, CONN = (f"{FOLDER}/{name}.py" for name in ("failed_sessions", "session_probe", "conn"))
METRICS, LOG = (f"python/sglang/srt/observability/failed_session_{name}.py" for name in ("metrics", "log"))
UNIT = "test/unit"
METRICS_TESTS, LOG_TESTS, CONN_TESTS, SESSIONS_TESTS, PROBE_TESTS = (
    f"{UNIT}/test_{name}.py" for name in ("metrics", "log", "conn", "failed_sessions", "session_probe")
)
DEADLINE_S = 600.0


class Break(NamedTuple):
    """One mechanism, how it is switched off, and the tests of which one must go red."""

    mechanism: str
    file: str
    before: str
    after: str
    tests: str = UNIT


BREAKS = [
    Break("generation check", SESSIONS, "if record.generation != question.generation:", "if False:"),
    Break(
        "generation check, on a plain set",
        CONN,
        " and failures.get(session) is counts[session]",
        "",
    ),
    Break("settle", SESSIONS, "if now < settled_at:", "if False:"),
    Break(
        "settles again after a read that waited",
        SESSIONS,
        "Verdict.READABLE_LATE and self._settles_again(record, now)",
        "Verdict.READABLE_LATE and False",
    ),
    Break("verification", SESSIONS, "elif not self.verifying:", "elif True:"),
    Break(
        "pause after a failed verification",
        SESSIONS,
        "max(MIN_VERIFY_PAUSE_S, min(VERIFY_PAUSE_FACTOR, 2.0 ** min(record.looks_in_vain, 64)) * took_s)",
        "0.0",
    ),
    Break(
        "longer pauses for a peer that was gone",
        SESSIONS,
        "if record.was_gone and record.answered_since is not None:",
        "if False:",
    ),
    Break("slow fail-open", SESSIONS, "elif now >= self._opens_at(record) and (", "elif False and ("),
    Break("verification switched off when reads prove nothing", SESSIONS, "self.verifying = False", "pass"),
    Break("hold after a relapse", SESSIONS, "elif now < record.hold_until:", "elif False:"),
    Break(
        "hold forgotten after a quiet spell",
        SESSIONS,
        "if not record.blacklisted and self._is_past",
        "if False and self._is_past",
    ),
    Break("registration ends probation", SESSIONS, "self._registration(record.id) is not record.registration", "False"),
    Break(
        "registration takes off the blacklist",
        SESSIONS,
        "        self._hear(self._forget, session)\n\n    def remove",
        "\n    def remove",
    ),
    Break("limit of probes under way", SESSIONS, "len(self._young) < self._settings.concurrency and ", ""),
    Break(
        "stuck probes do not count",
        SESSIONS,
        "            self._stuck += 1\n",
        "            self._stuck += 1\n            self._young[question] = False\n            break\n",
    ),
    Break("stuck among many", SESSIONS, "if self._stuck < self._unproven_limit else STUCK_AFTER_AMONG_MANY_S", ""),
    Break("bound on stuck probes", SESSIONS, "or self._stuck >= self._stuck_limit - STUCK_RESERVE", ""),
    Break(
        "places kept for fresh failures",
        SESSIONS,
        "if self._stuck >= self._stuck_limit - 2 * STUCK_RESERVE:",
        "if False:",
    ),
    Break(
        "one question to a session at a time",
        SESSIONS,
        "self._is_blacklisted(record) and record.id not in self._asked:",
        "self._is_blacklisted(record):",
    ),
    Break("gap grows with the outage", SESSIONS, "GAP_SHARE_OF_OUTAGE * (now - record.failed_at)", "0.0"),
    Break("350 probes a second at most", SESSIONS, "        self._allowance -= len(questions)\n", ""),
    Break(
        "idle sessions are forgotten", SESSIONS, "                self._drop(record, now)\n", "                pass\n"
    ),
    Break(
        "malformed ids are never probed",
        SESSIONS,
        "if is_session_id(session):\n            self._schedule_at",
        "if True:\n            self._schedule_at",
    ),
    Break(
        "a bounded number of sessions under the lock",
        SESSIONS,
        "        for _ in range(BATCH):\n            if not self._schedule or",
        "        for _ in range(10**9):\n            if not self._schedule or",
    ),
    Break(
        "no engine call under the lock",
        CONN,
        "        workers.start(self._look, questions, answers)\n",
        "        with self._lock:\n            for question in questions:\n"
        "                answers.put((question, self._look(question), None))\n",
    ),
    Break("a failure wakes the loop", SESSIONS, "        self._wake()\n\n    def _is_past", "\n    def _is_past"),
    Break("four reads in a row", PROBE, "for _ in range(READS_IN_A_ROW):", "for _ in range(1):"),
    Break("no read without a fresh answer", PROBE, "if ask(self._engine, session) != 0:", "if False:"),
    Break("the loop stops at shutdown", CONN, "while not self.shutdown.is_set():", "while True:"),
    Break(
        "no new probes after shutdown",
        CONN,
        "[] if self.shutdown.is_set() else self.sessions.take_due(due_by)",
        "self.sessions.take_due(due_by)",
    ),
    Break("stop at exit", CONN, "        atexit.register(self.stop)\n", ""),
    Break(
        "threads are parked at exit",
        PROBE,
        "    atexit.register(_park_threads_in_engine)\n",
        "",
        "test/faults/test_exits.py",
    ),
    Break(
        "the next round begins at once while more is due",
        CONN,
        "                elif wait_s > 0.0:  # else more is due than one round lines up\n",
        "                else:\n",
        CONN_TESTS,
    ),
    Break(
        "a pass by hand asks all that is due",
        CONN,
        "waits = left > 0 and self.sessions.waits_for_allowance() and not self.shutdown.is_set()",
        "waits = False",
        CONN_TESTS,
    ),
    Break(
        "references are counted under the lock",
        CONN,
        "    with manager.session_lock:\n        for name, kind in _NEEDED.items():",
        "    if True:\n        for name, kind in _NEEDED.items():",
        CONN_TESTS,
    ),
    Break(
        "threads in a futex of the engine are parked",
        PROBE,
        "(not interpreter or state.argument in interpreter)",
        "True",
        f"{UNIT}/test_exit.py",
    ),
    Break(
        "who came back before the signal goes on",
        PROBE,
        "    if not 0 < state.stack - parked.stack <= _LARGEST_SIGNAL_FRAME:\n        return False\n",
        "    return True\n",
        f"{UNIT}/test_exit.py",
    ),
    Break(
        "who gets the interpreter late is waited for",
        PROBE,
        "_COME_BACK_WITHIN_S = 3.0",
        "_COME_BACK_WITHIN_S = 0.05",
        f"{UNIT}/test_exit.py",
    ),
    Break(
        "nobody else gets the interpreter while a thread is parked",
        PROBE,
        "            sys.setswitchinterval(_KEEP_INTERPRETER_S)\n",
        "",
        f"{UNIT}/test_exit.py",
    ),
    Break(
        "a signal that raises while a thread is parked",
        PROBE,
        "        except BaseException:  # a signal handler that raises: what is done is done, the rest must be",
        "        except Exception:",
        f"{UNIT}/test_exit.py",
    ),
    Break(
        "threads that cannot be seen are not waited for",
        PROBE,
        "                elif not state.call and time.monotonic() > began + _UNSEEN_WITHIN_S:",
        "                elif False:",
        f"{UNIT}/test_exit.py",
    ),
    Break(
        "a lock that somebody has wrapped is a lock",
        CONN,
        'not hasattr(type(manager.session_lock), "__exit__")',
        'type(manager.session_lock).__name__ != "lock"',
        f"{UNIT}/test_patch.py",
    ),
    Break(
        "half a second between probes at most",
        SESSIONS,
        "(now - record.failed_at)), MAX_GAP_S)",
        "(now - record.failed_at)), 1e9)",
    ),
    Break(
        "a slow verification lets another go",
        SESSIONS,
        "question.asked_at + SLOW_VERIFICATION_S for question in self._verifications\n        ):",
        "question.asked_at + 1e9 for question in self._verifications\n        ):",
    ),
    Break("limit of verifications", SESSIONS, "if len(self._verifications) >= VERIFICATION_LIMIT or any(", "if any("),
    Break("reads prove nothing only after two probations", SESSIONS, "if not record.still_unreadable:", "if False:"),
    Break(
        "a failure begins the proof anew",
        SESSIONS,
        "        self.still_unreadable = False\n",
        "        self.still_unreadable = getattr(self, 'still_unreadable', False)\n",
    ),
    Break(
        "verification is switched off once",
        SESSIONS,
        "if verdict is Verdict.UNREADABLE and self.verifying:",
        "if verdict is Verdict.UNREADABLE:",
    ),
    Break(
        "asked while it settles for long", SESSIONS, "min(settled_at, now + self._settings.interval_s)", "settled_at"
    ),
    Break(
        "ends are looked at in time",
        SESSIONS,
        "min(self._ends_at(record), now + LONGEST_END_CHECK_S)",
        "self._ends_at(record)",
    ),
    Break("longer probation for slow transfers", SESSIONS, "max(1.0, transfer_timeout_s / TRANSFER_TIMEOUT_S)", "1.0"),
    Break("lost answers are asked for again", CONN, "                    self.sessions.lost(question)\n", ""),
    Break(
        "one lost answer costs no other",
        CONN,
        "                except Exception as raised:",
        "                except ZeroDivisionError as raised:",
    ),
    Break(
        "idle threads beyond concurrency end",
        CONN,
        "keep=0 if wait_s is None else self._settings.concurrency",
        "keep=0 if wait_s is None else 10**9",
    ),
    Break("the plain set comes back", CONN, "            _give_blacklist_back(manager)\n", ""),
    Break(
        "raising probes are said up to a bound",
        LOG,
        " or len(self._raising) >= failed_sessions.SAID_LIMIT",
        "",
        LOG_TESTS,
    ),
    Break(
        "unknown addresses fail nothing",
        PROBE,
        "with contextlib.suppress(Exception):  # addresses",
        "with contextlib.suppress(ZeroDivisionError):  # addresses",
    ),
    Break("no lane left half used", PROBE, "if was_gone and time.monotonic() - began < _WAITED_S:", "if False:"),
    Break(
        "session_lock is free after a fork",
        CONN,
        "os.register_at_fork(after_in_child=self._lock._at_fork_reinit)",
        "pass",
        "test/faults/test_processes.py",
    ),
    Break(
        "gauges of dead processes, at a start",
        METRICS,
        "            _forget_dead_processes()\n\n    def stop",
        "            pass\n\n    def stop",
        METRICS_TESTS,
    ),
    Break(
        "gauges of dead processes, at a blacklisting",
        METRICS,
        "self._dead_may_be_left = True",
        "pass",
        METRICS_TESTS,
    ),
    Break("gauges begin at 0", METRICS, "metric.set(0)", "pass", METRICS_TESTS),
    Break("gauges end at 0", CONN, "        self.metrics.stop()\n", "", METRICS_TESTS),
    Break("gauges add up", METRICS, 'multiprocess_mode="livesum"', 'multiprocess_mode="livemax"', METRICS_TESTS),
    Break("metrics are there from the start", CONN, "prober.metrics.start(", "id(", METRICS_TESTS),
    Break(
        "a metric that fails stops nothing", METRICS, "    except Exception:\n", "    except KeyError:\n", METRICS_TESTS
    ),
    Break(
        "a metric is registered once",
        METRICS,
        "        if self._metric is None:\n            with self._lock:\n                if self._metric is None:",
        "        if True:\n            with self._lock:\n                if True:",
        METRICS_TESTS,
    ),
    Break(
        "the loop hears of a registration",
        SESSIONS,
        "            if record.blacklisted:\n                self._wake()",
        "            if False:\n                pass",
        METRICS_TESTS,
    ),
    Break("lines are summed up", LOG, "if spell.said < LINES_IN_A_SPELL:", "if True:", LOG_TESTS),
    Break(
        "left out lines are counted",
        LOG,
        "if spell.left_out and (over or (at_once and not spell.summed_up)):",
        "if False:",
        LOG_TESTS,
    ),
    Break(
        "said before a long silence",
        CONN,
        "                if wait_s is None:\n                    self._log.sum_up(at_once=True)",
        "                if wait_s is None:\n                    pass",
        CONN_TESTS,
    ),
    Break("told once that a peer cuts probes short", SESSIONS, "record.listen_at = _NEVER", "pass", SESSIONS_TESTS),
    Break(
        "a peer that is gone is not said to cut probes short",
        PROBE,
        " or not _takes_connections(session)",
        "",
        PROBE_TESTS,
    ),
    Break(
        "a peer that is stopped is not said to cut probes short",
        PROBE,
        "rc == _NO_ANSWER and time.monotonic() - began <= _CUT_SHORT_WITHIN_S",
        "rc == _NO_ANSWER",
        PROBE_TESTS,
    ),
    Break(
        "looks ten a second at most",
        SESSIONS,
        "max(record.listen_at, self._listen_at)",
        "record.listen_at",
        SESSIONS_TESTS,
    ),
    Break(
        "what hangs holds up none of its batch",
        PROBE,
        "        while self._waiting:\n            self._start_next()\n",
        "",
        PROBE_TESTS,
    ),
    Break(
        "the allowance covers a round",
        SESSIONS,
        "max(PROBES_AT_ONCE, LONGEST_ROUND_S * per_s)",
        "PROBES_AT_ONCE",
        SESSIONS_TESTS,
    ),
    Break(
        "turns change when one was asked",
        SESSIONS,
        "self._prompt_next ^= record is not None",
        "self._prompt_next ^= True",
        SESSIONS_TESTS,
    ),
    Break(
        "a second name is refused",
        CONN,
        "sys.getrefcount(manager.failed_sessions) > 2",
        "False",
        f"{UNIT}/test_patch.py",
    ),
    Break("an unreadable peer is told once", SESSIONS, "if record.unreadable is None:\n", "if True:\n", SESSIONS_TESTS),
    Break(
        "a look at the data path in each outage",
        SESSIONS,
        "        self.unreadable: Optional[str] = None\n",
        "        self.unreadable: Optional[str] = getattr(self, 'unreadable', None)\n",
        SESSIONS_TESTS,
    ),
    Break("summed up once a spell", LOG, "(at_once and not spell.summed_up)", "at_once", LOG_TESTS),
    Break(
        "the pause grows over outages",
        SESSIONS,
        "        self.was_gone = False\n",
        "        self.was_gone = False\n        self.looks_in_vain = 0\n",
        SESSIONS_TESTS,
    ),
    Break("the gap counts from when it was asked", SESSIONS, "record.asked_at + gap_s - now", "gap_s", SESSIONS_TESTS),
    # The most important ones once more, on real engines.
    Break(
        "generation check, real engines",
        SESSIONS,
        "if record.generation != question.generation:",
        "if False:",
        "test/faults/test_registration.py",
    ),
    Break(
        "verification, real engines",
        SESSIONS,
        "elif not self.verifying:",
        "elif True:",
        "test/faults/test_data_path.py",
    ),
    Break(
        "hold after a relapse, real engines",
        SESSIONS,
        "elif now < record.hold_until:",
        "elif False:",
        "test/faults/test_flapping.py",
    ),
    Break(
        "bound on stuck probes, real engines",
        SESSIONS,
        "or self._stuck >= self._stuck_limit - STUCK_RESERVE",
        "",
        "test/faults/test_hung_peers.py",
    ),
    Break("settle, real engines", SESSIONS, "if now < settled_at:", "if False:", "test/faults/test_late_bytes.py"),
]


def red_test(broken: Break) -> str:
    """The first test that goes red with the mechanism broken, or with none if that is empty; empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            source = CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
            else:
                shutil.copy(source, copy / name)
        if broken.mechanism:
            file = copy / broken.file
            text = file.read_text()
            if text.count(broken.before) != 1:
                sys.exit(f"{broken.mechanism}: it is in {broken.file} {text.count(broken.before)} times, not once")
            file.write_text(text.replace(broken.before, broken.after))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout",
            "20" if broken.tests.startswith(UNIT) else "120",
            broken.tests,
        ]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "(the run did not end)"
        reds = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        timed_out = re.findall(r"^.*?(test_\w+\.py).*Timeout", done.stdout + done.stderr, re.MULTILINE)
        return (reds or timed_out or [""])[0] or ("" if done.returncode == 0 else done.stdout[-300:])


def main(words: list[str]) -> int:
    """Break what was asked for; 0 if a test went red each time."""
    unseen = 0
    chosen = [broken for broken in BREAKS if not words or any(word in broken.mechanism for word in words)]
    for tests in dict.fromkeys(broken.tests for broken in chosen):
        if red := red_test(Break("", "", "", "", tests)):
            sys.exit(f"{tests} is red with nothing broken: {red}")
    for broken in chosen:
        red = red_test(broken)
        unseen += not red
        print(f"{broken.mechanism}: {red or 'NO TEST GOES RED'}", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
