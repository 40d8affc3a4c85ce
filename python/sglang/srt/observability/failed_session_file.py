"""How does another process of this node learn what a scheduler knows of its sessions? From a file that it writes.

Each line of it is JSON: one about the scheduler, then one for each session. A scheduler holds a lock on its file as
long as it lives, in whatever container that is; a forked child does not. A file without a lock was left by a scheduler
that was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import pathlib
import secrets
import stat
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from typing import IO, Any, Optional

from sglang.srt.disaggregation.mooncake.session_watch import SessionWatch
from sglang.srt.observability.failed_session_rows import Row, rows_of
from sglang_failed_session_probe.harmless_logger import logger
from sglang_failed_session_probe.printable import printable, printable_repr

_PREFIX = "sglang-failed-sessions-"
_FORMAT = 1
_BEGINS = b'{"format": '  # the file of every version of this package
# A row has some 300 bytes, so no file of ours comes near the limit.
_MOST_ROWS = 2_000
_MOST_BYTES = 16 << 20


def folders() -> list[pathlib.Path]:
    """Where a scheduler's file may be. Every container can write to the first, also if its root is read-only."""
    found = ["/dev/shm"]
    with contextlib.suppress(OSError):  # there is no other folder to write to
        found.append(tempfile.gettempdir())
    return [pathlib.Path(folder) for folder in dict.fromkeys(found)]


def paths() -> Iterator[pathlib.Path]:
    """What may be files of this node's schedulers, with those of dead ones and of other users."""
    for folder in folders():
        yield from sorted(path for path in folder.glob(f"{_PREFIX}*") if path.suffix != ".new")


_own_names: set[str] = set()  # of the files of this process


class SessionsFile:
    """The file of one scheduler; ``rank`` is in words. Raises nothing. For one thread."""

    def __init__(
        self,
        rank: str,
        can_probe: bool,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._about = {"format": _FORMAT, "pid": os.getpid(), "rank": rank, "can_probe": can_probe}
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._name = f"{_PREFIX}{os.geteuid()}-{os.getpid()}-{secrets.token_hex(4)}"
        _own_names.add(self._name)
        self._path: Optional[pathlib.Path] = None
        self._locked: Optional[IO[str]] = None
        self._is_out_of_date = True  # a scheduler is to be seen before it has blacklisted anybody
        self._next_at = clock()
        self._fault_said = False

    def write_if_due(self, watch: SessionWatch) -> Optional[float]:
        """Writes what the watch knows, if that is due. Returns the seconds until it is due again, None once the file
        says that nothing is blacklisted. ``session_lock`` is not held, and not needed.
        """
        least_gap_s, gap_per_write = 1.0, 500.0  # 0.2 % of a core at most
        blacklisted = len(watch.sessions) > 0
        if not blacklisted and not self._is_out_of_date:
            return None
        self._is_out_of_date = True
        now = self._clock()
        if now >= self._next_at:
            began = self._cpu_clock()
            try:
                self._write(watch, now)
            except Exception as fault:
                self._say(fault)
            self._is_out_of_date = blacklisted
            self._next_at = now + max(least_gap_s, gap_per_write * (self._cpu_clock() - began))
        return max(0.0, self._next_at - now) if self._is_out_of_date else None

    def remove(self) -> None:
        if self._path is not None:
            _remove(self._path)
        if self._locked is not None:
            self._locked.close()
        _own_names.discard(self._name)

    def _write(self, watch: SessionWatch, now: float) -> None:
        if self._path is not None:
            self._replace(self._path, watch, now)
            return
        faults = []
        for folder in folders():
            try:
                self._replace(folder / self._name, watch, now)
            except OSError as fault:
                faults.append(fault)
            else:
                self._path = folder / self._name
                return
        raise faults[0]

    def _replace(self, path: pathlib.Path, watch: SessionWatch, now: float) -> None:
        """Puts a new file in place of the one before, so that nobody reads half a file or one without a lock."""
        new = _new(path)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        file = open(descriptor, "w", encoding="ascii")  # noqa: SIM115 as long as it is open it is locked
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(_to_json({**self._about, "written_at": now, "known": len(watch.known)}) + "\n")
            for row in itertools.islice(rows_of(watch, now), _MOST_ROWS):
                file.write(_to_json(row) + "\n")
            file.flush()
            os.rename(new, path)
        except BaseException:
            _remove(new)
            with contextlib.suppress(OSError):  # close flushes again
                file.close()
            raise
        if self._locked is not None:
            self._locked.close()
        self._locked = file

    def _say(self, fault: Exception) -> None:
        if not self._fault_said:
            self._fault_said = True
            logger.error(
                "Failed-session probe: the file for the command sessions cannot be written (%s), said once; sessions "
                "recover all the same",
                str(fault),
            )


_to_json = json.JSONEncoder(allow_nan=False).encode


def _new(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".new")


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def remove_dead() -> None:
    """Removes the files of schedulers that were killed. Raises nothing."""
    with contextlib.suppress(OSError):  # no descriptor is left to look through a folder
        for path in paths():
            if path.name not in _own_names:  # a process that closes its own file loses the lock on it
                with contextlib.suppress(Exception):
                    read(path)


# Reading.


class Unreadable(Exception):
    """It is no file of a scheduler, or another user's; the message says which."""


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What one scheduler has written about itself and its sessions."""

    uid: int
    pid: int  # as in its container, outside of which it has another one
    rank: str
    can_probe: bool
    written_at: float
    known: int  # how many sessions it knows; rows may leave some out
    rows: list[Row]


def _kinds(hint: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(hint)
    return typing.get_args(hint) if origin is typing.Union else (origin or hint,)


# The types that each field of a record may have.
_FIELDS: dict[Any, dict[str, tuple[Any, ...]]] = {
    record: {name: _kinds(hint) for name, hint in typing.get_type_hints(record).items()} for record in (Scheduler, Row)
}


def read(path: pathlib.Path) -> Optional[Scheduler]:
    """What a scheduler has written; None if it is dead, and then the file is removed if that is allowed.

    Raises Unreadable. Not for the process that writes the file: it would lose its lock.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(_why_not_opened(path, error)) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("it is no regular file")
        if os.geteuid() not in (0, found.st_uid):
            raise Unreadable(_of_another_user(found.st_uid))
        if found.st_size > _MOST_BYTES:
            raise Unreadable(f"it has {found.st_size} bytes, which no file of a scheduler has")
        with open(descriptor, "rb", closefd=False) as file:
            text = file.read(_MOST_BYTES)
        if _is_locked(descriptor):
            scheduler = _parsed(text, found.st_uid)
            if scheduler.written_at > time.monotonic() + 1.0:
                raise Unreadable("it was written by another clock than this machine's")
            return scheduler
        if not text.startswith(_BEGINS):
            raise Unreadable("no version of this package writes such files")
        if os.fstat(descriptor).st_nlink:  # no newer file has replaced it
            _remove(path)
            _remove(_new(path))
            return None
    finally:
        os.close(descriptor)
    return read(path)  # the newer one


def _why_not_opened(path: pathlib.Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a symbolic link"
    with contextlib.suppress(OSError):
        if error.errno == errno.EACCES:
            return _of_another_user(path.lstat().st_uid)
    return f"it cannot be opened ({error.strerror})"


def _of_another_user(uid: int) -> str:
    return f"it belongs to user {uid}: run this as that user or as root"


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _parsed(text: bytes, uid: int) -> Scheduler:
    try:
        about, *rows = map(json.loads, text.decode().splitlines())
        if about.pop("format") != _FORMAT:
            raise ValueError("another format")
        scheduler = Scheduler(uid=uid, rows=[Row(*row) for row in rows], **about)
        for record in (scheduler, *scheduler.rows):
            for name, kinds in _FIELDS[type(record)].items():
                if not _is_one_of(kinds, getattr(record, name)):
                    raise ValueError(f"{name} is {printable_repr(getattr(record, name))}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unreadable(f"this version of the package does not write such files ({printable(str(error))})") from error
    return scheduler


def _is_one_of(kinds: tuple[Any, ...], value: object) -> bool:
    """True if the value, read from JSON, has one of the types and, if it is a number, a size that makes sense."""
    if isinstance(value, (int, float)) and not -1e15 < value < 1e15:
        return False
    return type(value) in kinds or (type(value) is int and float in kinds)
