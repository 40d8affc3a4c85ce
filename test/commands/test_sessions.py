"""What does `sessions` show of schedulers that refuse sessions, of killed ones, and of files that nobody wrote?"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from command import Terminal, interrupt, run, started
from kit.paths import PYTHON_FOLDER, PYTHONPATH

# The command, and a scheduler, whose files are in a folder of the test's own.
ELSEWHERE = """
import pathlib, sys
from sglang_failed_session_probe import own_files
own_files.leave_sglang_out()
from sglang.srt.observability import failed_session_file
failed_session_file.folders = lambda: [pathlib.Path({folder!r})]
"""
COMMAND = "from sglang_failed_session_probe.__main__ import main; main()"
# A prefill scheduler on an engine that is a Python object. It does what it reads, a line at a time.
SCHEDULER = """
import sys, time, types
from kit.fake_engine import PENDING, REFUSED, Engine
from kit.managers import *
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
engine = Engine(probe=REFUSED)
MooncakeKVManager.init_engine = lambda self: setattr(self, "engine", engine)
arguments = types.SimpleNamespace(**vars(NO_MEMORY), engine_rank=int(sys.argv[1]))
manager = MooncakeKVManager(arguments, "prefill")
wait_until(lambda: manager._failed_session_prober._file._path)
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


# Makes a container of what it runs: processes of its own, a read-only root, another user, a /dev/shm that it shares.
CONTAINER = """
mount --bind "$0" /dev/shm && mount -o remount,bind,ro / || exit 1
user=$1; shift
exec setpriv --reuid "$user" --regid "$user" --clear-groups "$@"
"""


def contained(folder: pathlib.Path, user: int) -> list[str]:
    """What is to stand in front of a command that is to run in a container."""
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", CONTAINER, str(folder), str(user)]


class Scheduler:
    """A prefill scheduler in a process of its own, with the rank TP``rank``."""

    def __init__(self, folder: pathlib.Path, rank: int, user: int | None = None) -> None:
        code = SCHEDULER if user else ELSEWHERE.format(folder=str(folder)) + SCHEDULER
        switch = {"SGLANG_ENABLE_FAILED_SESSION_PROBE": "1", "PYTHONPATH": PYTHONPATH}
        self._folder = folder
        self.process = subprocess.Popen(
            [*(contained(folder, user) if user else []), sys.executable, "-c", code, str(rank)],
            env={**os.environ, **switch},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self.process.pid
        self._hear("ready")

    def do(self, code: str) -> None:
        """Has it run a line of Python."""
        assert self.process.stdin is not None
        print(code, file=self.process.stdin, flush=True)
        self._hear("done")

    def wait_for(self, words: str) -> None:
        """Waits until the words are in what it writes."""
        deadline = time.monotonic() + 20
        while words not in "".join(path.read_text() for path in self._folder.glob(f"*-{self.pid}-*") if path.is_file()):
            assert time.monotonic() < deadline, f"it does not write {words!r}"
            time.sleep(0.05)

    def _hear(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n", "the scheduler has ended"

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where the schedulers' files are."""
    made = tmp_path / "shm"
    made.mkdir()
    return made


@pytest.fixture
def start(folder: pathlib.Path) -> Iterator[Callable[..., Scheduler]]:
    """Starts schedulers, and kills them after the test."""
    with contextlib.ExitStack() as stack:

        def start(rank: int = 0, user: int | None = None) -> Scheduler:
            scheduler = Scheduler(folder, rank, user)
            stack.callback(scheduler.kill)
            return scheduler

        yield start


def command(folder: pathlib.Path) -> dict[str, Any]:
    return {"what": ("-c", ELSEWHERE.format(folder=str(folder)) + COMMAND)}


def sessions(folder: pathlib.Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
    return run("sessions", *arguments, **command(folder), **options)


def facts(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The rows as scripts get them, by session."""
    status, output, errors = sessions(folder, "--json")
    assert (status, errors) == (0, "")
    return {row["session"]: row for row in json.loads(output)}


def test_a_row_a_session_and_rank_that_says_why_it_is_out(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    first, second = start(0), start(1)
    first.do('engine.probe["hung:1"] = engine.hang; blacklist(manager, "gone:1", "hung:1")')
    first.do('with manager.session_lock: ["gone:1" in manager.failed_sessions for _ in range(3)]')
    second.do('engine.read = -1; engine.probe["bad:1"] = 0; manager.register_decode("bad:1", SOME_MEMORY)')
    second.do('blacklist(manager, "bad:1", "gone:1")')
    first.wait_for('"refused"')
    second.wait_for("reading its memory gave -1")
    status, output, errors = sessions(folder)
    assert (status, errors) == (0, "")
    headings, *rows = output.splitlines()
    assert headings.split("  ")[0] == "scheduler"
    assert "requests refused" in headings, "a probe that is refused is another thing"
    by_session = {tuple(row.split()[:3])[1:]: row for row in rows}
    assert sorted(by_session) == [("TP0", "gone:1"), ("TP0", "hung:1"), ("TP1", "bad:1"), ("TP1", "gone:1")]
    assert [row.split()[0] for row in rows].count(str(first.pid)) == 2
    gone = by_session["TP0", "gone:1"]
    assert gone.endswith("it does not answer")
    assert gone.split()[5] == "3"
    assert "refused, " in gone
    assert "its probe hangs, for " in by_session["TP0", "hung:1"]
    bad = by_session["TP1", "bad:1"]
    assert "it answers, but reading its memory gave -1; let in unverified in " in bad
    assert "answered, " in bad
    assert all(row.isprintable() for row in rows)


def test_one_that_is_held_and_one_on_probation_say_for_how_long(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    scheduler = start()
    scheduler.do("engine.probe[D] = engine.probe[OTHER] = 0; blacklist(manager, D, OTHER)")
    scheduler.wait_for('"decode:7001", false')
    probation = facts(folder)["decode:7001"]
    assert probation["blacklisted"] is False
    assert 500 < probation["on_probation_for_s"] <= 600
    for _ in range(4):
        scheduler.do("assert wait_until(lambda: not blacklisted(manager), 20)")
        scheduler.do("with manager.session_lock: D in manager.failed_sessions")
        scheduler.do("blacklist(manager, D)")
    deadline = time.monotonic() + 5
    while not (held := facts(folder)["decode:7001"])["held_for_s"]:
        assert time.monotonic() < deadline, held
    assert held["blacklisted"] is True
    assert 1 < held["held_for_s"] < 8
    assert "; held for " in held["why"]
    assert facts(folder)["other:7002"]["blacklisted"] is False


def test_a_malformed_id_reaches_no_terminal_and_breaks_no_table(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    scheduler = start()
    scheduler.do(r'blacklist(manager, "\x1b[31mred\n\u2028", "a" * 100_000, 7)')
    scheduler.wait_for("[...]")
    status, output, errors = sessions(folder)
    assert (status, errors) == (0, "")
    lines = output.split("\n")[:-1]
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert all("so it is never probed" in line for line in lines[1:])
    assert sessions(folder, "--json")[1].count("\n") == 1


def test_nothing_blacklisted_nobody_there_and_a_killed_scheduler_are_told_apart(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    status, output, errors = sessions(folder)
    assert (status, output) == (1, ""), "a node without the probe must not look well to a script"
    (line,) = errors.splitlines()
    assert "no scheduler with this probe is seen here" in line

    first, second = start(0), start(1)
    status, output, errors = sessions(folder)
    assert (status, errors) == (0, "")
    assert output.startswith("nothing is blacklisted by scheduler ")
    assert f"{first.pid} TP0" in output
    assert f"{second.pid} TP1" in output
    assert json.loads(sessions(folder, "--json")[1]) == []

    for scheduler in (first, second):
        scheduler.do("blacklist(manager, D)")
        scheduler.wait_for("decode:7001")
    second.kill()
    status, output, errors = sessions(folder)
    assert (status, errors) == (0, "")
    assert f"{first.pid} TP0" in output
    assert "TP1" not in output, "what a dead scheduler refused is shown for ever"
    assert len(list(folder.iterdir())) == 1
    first.do("manager.teardown()")
    assert sessions(folder)[0] == 1


def test_a_file_that_is_none_of_a_schedulers_gets_a_line_and_hides_nobody(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    scheduler = start()
    scheduler.do("blacklist(manager, D)")
    scheduler.wait_for("decode:7001")
    prefix = folder / "sglang-failed-sessions-0-1-"
    (folder / f"{prefix}a").symlink_to("/etc/passwd")
    os.mkfifo(f"{prefix}b")
    (folder / f"{prefix}c").write_text('{"pid"')
    (folder / f"{prefix}d\n\x1b[31m").mkdir()
    status, output, errors = sessions(folder)
    assert status == 1, "a scheduler may be among what cannot be read"
    assert re.search(rf"{scheduler.pid} TP0 +decode:7001", output)
    lines = errors.split("\n")[:-1]
    assert len(lines) == 4
    for line, words in zip(lines, ["symbolic link", "no regular file", "writes such files", "regular"], strict=True):
        assert words in line
        assert line.isprintable()


def test_what_a_forged_file_says_reaches_no_terminal(folder: pathlib.Path) -> None:
    """Anybody may write one and hold its lock; root reads it all the same."""
    evil = "\x1b[2J\nroot 10.0.3.7:15412"
    row = [evil, True, 1.0, 0, 0.0, evil, None, 2.0, 1.0, evil, None, evil, None, None, None, 1e6]
    about = {"format": 1, "pid": 1, "rank": evil, "can_probe": True, "written_at": 1.0, "known": 1}
    with (folder / "sglang-failed-sessions-0-1-x").open("w") as forged:
        fcntl.lockf(forged, fcntl.LOCK_EX)
        forged.write(f"{json.dumps(about)}\n{json.dumps(row)}\n{json.dumps(['10.0.3.7:1', *row[1:]])}\n")
        forged.flush()
        _, output, errors = sessions(folder)
        assert sessions(folder, "--json")[1].count("\n") == 1
    lines = [*output.split("\n")[:-1], *errors.split("\n")[:-1]]
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_root_sees_whose_a_scheduler_is_and_somebody_else_is_told_whom_to_be(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    scheduler = start()
    (path,) = folder.iterdir()
    os.chown(path, 4711, 4711)
    assert f"{scheduler.pid} TP0 of user 4711" in sessions(folder)[1]


def test_a_scheduler_that_does_not_write_any_more_is_shown_as_it_was(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    scheduler = start()
    scheduler.do("blacklist(manager, D)")
    scheduler.wait_for("decode:7001")
    scheduler.process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    status, output, errors = sessions(folder)
    assert status == 0
    assert "decode:7001" in output
    (line,) = errors.splitlines()
    assert re.search(rf"scheduler {scheduler.pid} TP0 is shown as it was \d+ s ago", line)


def test_watching_a_pipe_gives_one_block_after_another_until_a_ctrl_c(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    with started("sessions", "--watch", "1", **command(folder)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        nobody = [process.stdout.readline() for _ in range(3)]
        assert "no scheduler" in nobody[1]
        scheduler = start()
        scheduler.do("blacklist(manager, D)")
        while "decode:7001" not in (line := process.stdout.readline()):
            assert line, "it has ended"
        assert str(scheduler.pid) in line
        interrupt(process)
        assert process.stderr.read() == ""
    assert process.returncode == 130


def test_watching_on_a_terminal_redraws_the_table_in_colour(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    start().do("blacklist(manager, D)")
    with (
        Terminal() as terminal,
        started("sessions", "--watch", "1", stdout=terminal.end_of_command, NO_COLOR="", **command(folder)) as process,
    ):
        terminal.wait_for("\x1b[33mit does not answer", deadline_s=20)
        terminal.wait_for("\x1b[J\x1b[H", deadline_s=20)
        interrupt(process)


@pytest.fixture
def containers(folder: pathlib.Path) -> None:
    """Skips the test where no container can be made."""
    folder.chmod(0o1777)
    if why := subprocess.run([*contained(folder, 4711), "true"], capture_output=True, text=True).stderr:
        pytest.skip(f"nothing is tried with another user and a read-only root: {why.strip()}")


@pytest.mark.usefixtures("containers")
def test_containers_with_a_read_only_root_and_another_user_that_share_a_folder(
    folder: pathlib.Path, start: Callable[..., Scheduler]
) -> None:
    def sessions_as(user: int) -> tuple[int, str, str]:
        done = subprocess.run(
            [*contained(folder, user), sys.executable, "-m", "sglang_failed_session_probe", "sessions"],
            env={**os.environ, "PYTHONPATH": str(PYTHON_FOLDER)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    first, second = start(0, user=4711), start(1, user=4711)
    for scheduler in (first, second):
        scheduler.do("blacklist(manager, D)")
        scheduler.do("time.sleep(1.5)")
    status, output, errors = sessions_as(4711)
    assert (status, errors) == (0, "")
    rows = [row.split()[:3] for row in output.splitlines()[1:]]
    assert rows == [["1", "TP0", "decode:7001"], ["1", "TP1", "decode:7001"]]

    status, output, errors = sessions_as(4712)
    assert (status, output) == (1, "")
    assert errors.count("it belongs to user 4711: run this as that user or as root") == 2

    second.kill()
    status, output, errors = sessions_as(0)
    assert (status, errors) == (0, ""), "what is dead cannot be told from what lives in another container"
    assert [row.split()[:5] for row in output.splitlines()[1:]] == [["1", "TP0", "of", "user", "4711"]]
    assert len(list(folder.iterdir())) == 1
