"""Does the file of a scheduler say what it knows, when it may, and to nobody else, and is it gone with it?"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.fake_engine import REFUSED, Engine, raises
from kit.managers import D, MakeManager, blacklist, blacklisted
from kit.paths import PYTHON_FOLDER, PYTHONPATH
from kit.waiting import wait_until
from sglang.srt.observability import failed_session_file
from sglang.srt.observability.failed_session_file import SessionsFile
from virtual_prober import HEALTHY, REFUSING, VirtualProber, many

# A process that reads what is in a folder, as the command does: a JSON list with an object or the reason for each file.
READER = """
import dataclasses, json, pathlib, sys
from sglang.srt.observability import failed_session_file
failed_session_file.folders = lambda: [pathlib.Path(sys.argv[1])]
found = []
for _ in range(int(sys.argv[2])):
    for path in failed_session_file.paths():
        try:
            scheduler = failed_session_file.read(path)
            found.append(scheduler and dataclasses.asdict(scheduler))
        except failed_session_file.Unreadable as why:
            found.append(str(why))
print(json.dumps(found))
"""
# A scheduler that has lost a session and writes all the time, without a pause if that is wanted.
WRITER = """
import itertools, os, pathlib, sys, time
from sglang.srt.disaggregation.mooncake.session_watch import SessionWatch
from sglang.srt.environ import FailedSessionProbeSettings
from sglang.srt.observability import failed_session_file
failed_session_file.folders = lambda: [pathlib.Path(sys.argv[1])]
ticks = itertools.count(-1e9, 10)
clock = (lambda: next(ticks)) if sys.argv[2] == "spins" else time.monotonic
file = failed_session_file.SessionsFile("TP0", True, clock=clock)
watch = SessionWatch(FailedSessionProbeSettings(), ["decode:7001"])
file.write_if_due(watch)
child = os.fork() if "fork" in sys.argv[2] else None
if child == 0:
    time.sleep(0 if sys.argv[2] == "forks a child that ends" else 60)
    sys.exit()
if sys.argv[2] == "forks a child that ends":
    os.waitpid(child, 0)
print("ready", child, flush=True)
while True:
    file.write_if_due(watch)
    if sys.argv[2] != "spins":
        time.sleep(0.1)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where the files of this test are."""
    made = tmp_path / "shm"
    made.mkdir()
    monkeypatch.setattr(failed_session_file, "folders", lambda: [made])
    return made


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def read(folder: pathlib.Path, times: int = 1) -> list[Any]:
    """What another process reads there."""
    done = subprocess.run(
        python(READER, folder, times),
        env={**os.environ, "PYTHONPATH": str(PYTHON_FOLDER)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@contextlib.contextmanager
def scheduler(folder: pathlib.Path, how: str = "real") -> Iterator[subprocess.Popen[str]]:
    """A scheduler in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_FOLDER)}
    with subprocess.Popen(python(WRITER, folder, how), env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            _, child = process.stdout.readline().split()
            try:
                yield process
            finally:
                if how == "forks a child":
                    os.kill(int(child), signal.SIGKILL)
        finally:
            process.kill()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Written:
    """A file in virtual time, and how often it was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes_s: float = 0.0) -> None:
        self.clock, self.writes = Clock(), list[float]()
        self.prober = VirtualProber()
        self.file = SessionsFile("TP0", True, clock=self.clock, cpu_clock=self.clock)
        write = SessionsFile._write

        def counted(file: SessionsFile, *arguments: Any) -> None:
            self.writes.append(self.clock.now)
            write(file, *arguments)
            self.clock.now += takes_s

        monkeypatch.setattr(SessionsFile, "_write", counted)

    def run(self, seconds: float) -> None:
        """The loop comes round because it was woken, and then when the file asks for it."""
        end = self.clock.now + seconds
        while (wait_s := self.file.write_if_due(self.prober.watch)) is not None and self.clock.now + wait_s <= end:
            self.clock.now += max(0.001, wait_s)
        self.clock.now = end


# When is it written?


def test_nothing_is_written_while_nothing_is_blacklisted_but_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written(monkeypatch)
    written.run(3600)
    assert written.file.write_if_due(written.prober.watch) is None, "a timer runs though nothing is blacklisted"
    assert written.writes == [1000.0]


def test_it_is_written_at_once_and_then_once_a_second_while_something_is_blacklisted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = Written(monkeypatch)
    written.run(10)
    written.prober.fail(D, peer=REFUSING)
    began = written.clock.now
    written.run(10)
    assert written.writes[1] == began
    gaps = [later - sooner for sooner, later in zip(written.writes, written.writes[1:], strict=False)]
    assert min(gaps) >= 1.0, "more than once a second"
    assert len(written.writes) >= 10, "what it says is old"


def test_a_failure_within_a_second_of_the_last_write_is_written_after_it_though_nothing_else_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = Written(monkeypatch)
    written.run(0.3)
    written.prober.sessions.add("no session id")  # it is never probed, so the loop has no other reason to wake
    written.run(0.8)
    assert written.writes == [1000.0, 1001.0], "the command says that nothing is blacklisted"


def test_what_takes_long_to_write_is_written_seldomer(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written(monkeypatch, takes_s=0.02)
    written.prober.fail(*many("decode", 100), peer=REFUSING)
    written.run(100)
    assert 9 <= len(written.writes) <= 11, f"{len(written.writes)} writes of 0.02 s in 100 s"


def test_after_the_last_session_is_let_in_that_is_written_and_then_nothing(
    monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
) -> None:
    written = Written(monkeypatch)
    written.prober.fail(D, peer=HEALTHY)
    written.run(5)
    written.prober.run(2)
    assert not written.prober.sessions
    before = len(written.writes)
    written.run(600)
    assert len(written.writes) == before + 1
    (file,) = folder.iterdir()
    assert json.loads(file.read_text().splitlines()[1])[:2] == [D, False], "it is not said that it is on probation"


# What is in it?


def test_another_process_reads_what_was_written_by_the_clock_that_both_share(folder: pathlib.Path) -> None:
    before = time.monotonic()
    with scheduler(folder) as process:
        (seen,) = read(folder)
    assert (seen["pid"], seen["rank"], seen["can_probe"], seen["uid"]) == (process.pid, "TP0", True, os.geteuid())
    assert before < seen["written_at"] < time.monotonic()
    ((session, is_blacklisted, since, refused, *_),) = seen["rows"]
    assert (session, is_blacklisted, refused) == (D, True, 0)
    assert before < since < time.monotonic()


def test_two_thousand_sessions_can_be_read_and_more_are_counted(folder: pathlib.Path) -> None:
    SessionsFile("", True).write_if_due(VirtualProber(*many("decode", 10_500)).watch)
    (path,) = folder.iterdir()
    assert path.stat().st_size < failed_session_file._MOST_BYTES
    seen = failed_session_file._parsed(path.read_bytes(), 0)
    assert (len(seen.rows), seen.known) == (2_000, 10_500)


def test_nobody_else_can_read_it_and_no_program_that_is_started_inherits_it(folder: pathlib.Path) -> None:
    usual = os.umask(0)
    try:
        file = SessionsFile("", True)
        file.write_if_due(VirtualProber().watch)
    finally:
        os.umask(usual)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file._locked is not None
    assert not os.get_inheritable(file._locked.fileno())


def test_a_reader_never_sees_half_of_it_nor_takes_a_scheduler_for_dead_while_it_writes(folder: pathlib.Path) -> None:
    with scheduler(folder, "spins"):
        seen = read(folder, times=2000)
    assert len(seen) == 2000
    assert [found for found in seen if not isinstance(found, dict)] == []


# When is it gone?


@pytest.mark.parametrize("how", ["real", "forks a child"])
def test_what_a_killed_scheduler_left_is_not_taken_for_true_and_is_removed(how: str, folder: pathlib.Path) -> None:
    """A child that it has forked lives on."""
    with scheduler(folder, how) as process:
        (folder / f"{next(folder.iterdir()).name}.new").write_text("half of")  # it may be killed while it writes
        process.kill()
        process.wait(10)
        assert read(folder) == [None]
        assert list(folder.iterdir()) == []


def test_a_forked_child_that_ends_takes_nothing_away(folder: pathlib.Path) -> None:
    with scheduler(folder, "forks a child that ends") as process:
        (seen,) = read(folder)
        assert seen["pid"] == process.pid


def test_a_stopped_scheduler_is_no_dead_one(folder: pathlib.Path) -> None:
    with scheduler(folder) as process:
        process.send_signal(signal.SIGSTOP)
        (seen,) = read(folder)
        assert seen["pid"] == process.pid


def test_a_scheduler_that_starts_removes_what_dead_ones_left_and_leaves_the_living_alone(folder: pathlib.Path) -> None:
    """A container that is started anew gives the same numbers to its processes."""
    with scheduler(folder) as living, scheduler(folder) as dead:
        dead.kill()
        dead.wait(10)
        (left,) = folder.glob(f"*-{dead.pid}-*")
        left.rename(folder / left.name.replace(f"-{dead.pid}-", f"-{os.getpid()}-"))
        failed_session_file.remove_dead()
        own = SessionsFile("", True)
        own.write_if_due(VirtualProber().watch)
        failed_session_file.remove_dead()
        second = SessionsFile("", True)
        second.write_if_due(VirtualProber().watch)
        pids = [int(path.name.split("-")[4]) for path in folder.iterdir()]
        assert sorted(pids) == sorted([living.pid, os.getpid(), os.getpid()])
        assert len([found for found in read(folder) if found]) == 3, "a second manager cost the first one its lock"
    own.remove()
    second.remove()


def test_it_is_gone_once_the_manager_is_torn_down(make_manager: MakeManager, folder: pathlib.Path) -> None:
    manager = make_manager(Engine(probe=REFUSED))
    assert wait_until(lambda: list(folder.iterdir()), 2), "a scheduler that has blacklisted nobody is not seen"
    blacklist(manager, D)
    assert wait_until(lambda: D in "".join(path.read_text() for path in folder.glob("*[!w]")), 2)
    manager.teardown()
    assert wait_until(lambda: not list(folder.iterdir()), 1), "after a role switch its rows stay for ever"


EXITING = """
import pathlib, sys
from kit.fake_engine import Engine
from kit.managers import NO_MEMORY, D, blacklist
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
from sglang.srt.observability import failed_session_file
failed_session_file.folders = lambda: [pathlib.Path(sys.argv[1])]
engine = Engine()
engine.probe[D] = engine.hang
MooncakeKVManager.init_engine = lambda self: setattr(self, "engine", engine)
manager = MooncakeKVManager(NO_MEMORY, "prefill")
blacklist(manager, D)
assert wait_until(lambda: list(pathlib.Path(sys.argv[1]).iterdir()))
"""


def test_it_is_gone_once_the_process_has_exited_though_a_probe_hung(folder: pathlib.Path) -> None:
    environment = {**os.environ, "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1", "PYTHONPATH": PYTHONPATH}
    subprocess.run(python(EXITING, folder), env=environment, check=True, timeout=30)
    assert list(folder.iterdir()) == []


# What if it cannot be written?


@pytest.mark.parametrize(
    "fault",
    [
        "there is no folder",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("the disk is full", "a fault of its own")),
    ],
)
def test_a_file_that_cannot_be_written_is_said_once_and_sessions_recover_all_the_same(
    fault: str,
    make_manager: MakeManager,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device") if fault == "the disk is full" else ZeroDivisionError

    if fault == "there is no folder":
        folder.rmdir()
    elif fault == "the disk is full":
        monkeypatch.setattr(failed_session_file.os, "rename", fail)
    else:
        monkeypatch.setattr(failed_session_file, "rows_of", fail)
    engine = Engine(probe=REFUSED)
    manager = make_manager(engine)
    for _ in range(2):
        blacklist(manager, D)
        assert wait_until(lambda: D in engine.asked)
        time.sleep(1.1)
        engine.probe[D] = 0
        assert wait_until(lambda: not blacklisted(manager), 5), "a full disk keeps a healthy peer out"
        engine.probe[D] = REFUSED
    (said,) = [record for record in caplog.records if "command sessions" in record.getMessage()]
    assert said.levelno == logging.ERROR
    assert not folder.exists() or list(folder.iterdir()) == [], "half a file is left behind"


def test_where_the_first_folder_cannot_be_written_it_is_in_the_next(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_session_file, "folders", lambda: [tmp_path / "missing", folder])
    SessionsFile("", True).write_if_due(VirtualProber().watch)
    assert len(list(folder.iterdir())) == 1


def test_a_write_that_fails_leaves_what_was_there_and_the_next_one_mends_it(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(monkeypatch)
    written.prober.fail(D, peer=REFUSING)
    written.run(3)
    (path,) = folder.iterdir()
    before = path.read_text()
    with monkeypatch.context() as context:
        context.setattr(failed_session_file, "_to_json", lambda _: 1 / 0)
        written.run(3)
    assert path.read_text() == before
    written.run(3)
    assert path.read_text() != before
    assert list(folder.iterdir()) == [path]


# What if it is no file of ours?


def valid(**changes: Any) -> str:
    about = {"format": 1, "pid": 1, "rank": "", "can_probe": True, "written_at": 1.0, "known": 1, **changes}
    return json.dumps(about) + "\n"


ROW = [D, True, 1.0, 0, 0.0, "", None, None, 1.0, "", None, "", None, None, None, 1e6]


def with_row(**changes: Any) -> str:
    row = failed_session_file.Row(*ROW)._replace(**changes)
    return valid() + json.dumps(row) + "\n"


WRONG: dict[str, str] = {
    "empty": "",
    "no JSON": "sessions\n",
    "half a line": (valid() + json.dumps(ROW))[:-20],
    "no object": "[]\n",
    "another format": valid(format=2),
    "a field too many": valid(more=1),
    "a field of another type": valid(pid="1"),
    "a row of another length": valid() + "[1, 2]\n",
    "a row that is none": valid() + "7\n",
    "a session that is no text": with_row(session=["a"]),
    "a moment that is no number": with_row(next_at="now"),
    "true for a number": with_row(refused=True),
    "NaN": with_row(since=float("nan")),
    "infinity": with_row(ends_at=float("inf")),
    "beyond counting": with_row(since=1e300),
    "digits beyond counting": with_row(refused=10**4000),
    "more digits than Python reads": with_row(refused=7).replace("7", "7" * 10_000),
    "nested without an end": "[" * 100_000,
    "control characters": "\x1b[31m\n\x00\x07",
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_holds_something_else_is_refused_in_one_line_and_left_alone(
    case: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_session_file, "_is_locked", lambda descriptor: True)
    path = folder / "sglang-failed-sessions-0-1-x"
    path.write_bytes(WRONG[case].encode(errors="surrogateescape"))
    with pytest.raises(failed_session_file.Unreadable) as refusal:
        failed_session_file.read(path)
    assert "does not write such files" in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500
    assert path.exists()


def test_a_folder_that_cannot_be_looked_through_stops_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the process has no descriptor left when it starts."""
    monkeypatch.setattr(failed_session_file, "folders", raises(OSError(errno.EMFILE, "Too many open files")))
    failed_session_file.remove_dead()


@pytest.mark.parametrize("case", ["empty", "no JSON", "no object", "control characters", "no UTF-8"])
def test_a_file_without_a_lock_that_no_scheduler_has_written_is_left_alone(case: str, folder: pathlib.Path) -> None:
    path = folder / "sglang-failed-sessions-0-1-x"
    path.write_bytes(WRONG[case].encode(errors="surrogateescape"))
    failed_session_file.remove_dead()
    with pytest.raises(failed_session_file.Unreadable, match="no version of this package"):
        failed_session_file.read(path)
    assert path.exists()


@pytest.mark.parametrize("case", ["another format", "a field too many", "a row of another length"])
def test_what_a_killed_scheduler_of_another_version_left_is_removed(case: str, folder: pathlib.Path) -> None:
    path = folder / "sglang-failed-sessions-0-1-x"
    path.write_text(WRONG[case])
    failed_session_file.remove_dead()
    assert not path.exists()


def test_the_file_that_the_wrong_ones_differ_from_is_right(folder: pathlib.Path) -> None:
    assert failed_session_file._parsed(with_row().encode(), 0).rows == [tuple(ROW)]


def make_link(path: pathlib.Path) -> None:
    path.symlink_to("/etc/passwd")


def make_huge(path: pathlib.Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


NO_FILES: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "a link": (make_link, "it is a symbolic link"),
    "a folder": (pathlib.Path.mkdir, "it is no regular file"),
    "a pipe": (os.mkfifo, "it is no regular file"),
    "huge": (make_huge, "which no file of a scheduler has"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_is_refused_at_once(case: str, folder: pathlib.Path) -> None:
    path = folder / "sglang-failed-sessions-0-1-x"
    make, words = NO_FILES[case]
    make(path)
    with pytest.raises(failed_session_file.Unreadable) as refusal:
        failed_session_file.read(path)
    assert words in str(refusal.value)


def test_another_users_file_is_refused_and_it_is_said_whose_it_is(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "sglang-failed-sessions-0-1-x"
    path.write_text(with_row())
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(failed_session_file.Unreadable) as refusal:
        failed_session_file.read(path)
    assert str(refusal.value) == f"it belongs to user {os.getuid()}: run this as that user or as root"


def test_what_another_clock_says_is_refused(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another machine that shares the folder; nobody can tell from it for how long a session is held."""
    path = folder / "sglang-failed-sessions-0-1-x"
    path.write_text(valid(written_at=time.monotonic() + 1000))
    monkeypatch.setattr(failed_session_file, "_is_locked", lambda _: True)
    with pytest.raises(failed_session_file.Unreadable) as refusal:
        failed_session_file.read(path)
    assert "another clock" in str(refusal.value)
