"""How does a release look that differs from stock in one place? Makes copies of SGLang, edited there."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from kit.releases import sglang_folder

CONN = "srt/disaggregation/mooncake/conn.py"
PACKAGE = "srt/disaggregation/mooncake/__init__.py"
ENGINE = "srt/distributed/device_communicators/mooncake_transfer_engine.py"

SESSION_TABLE = """
class SessionTable(dict):
    def add(self, session):
        self[session] = True

    def discard(self, session):
        self.pop(session, None)

    remove = dict.__delitem__


class MooncakeKVManager("""


@dataclasses.dataclass(frozen=True)
class Build:
    """A build of SGLang: what is edited (file -> pattern, replacement), what our ERROR line must name as missing, and
    what stock_manager.py has to know about the names in it."""

    edits: Mapping[str, Mapping[str, str]]
    missing: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


BUILDS = {
    "blacklist renamed": Build(
        {CONN: {r"\bfailed_sessions\b": "dead_sessions"}}, "failed_sessions", {"blacklist": "dead_sessions"}
    ),
    "lock renamed": Build({CONN: {r"\bsession_lock\b": "session_guard"}}, "session_lock", {"lock": "session_guard"}),
    "blacklist is a dict": Build(
        {
            CONN: {
                r"failed_sessions = set\(\)": "failed_sessions = SessionTable()",
                r"\nclass MooncakeKVManager\(": SESSION_TABLE,
            }
        },
        "failed_sessions",
    ),
    "blacklist has a second name": Build(
        {CONN: {r"( +)(self\.failed_sessions = set\(\)\n)": r"\1\2\1self.dead_sessions = self.failed_sessions\n"}},
        "failed_sessions without a second name",
    ),
    "manager's class renamed": Build(
        {file: {r"\bMooncakeKVManager\b": "MooncakeManager"} for file in (CONN, PACKAGE)},
        "MooncakeKVManager",
        {"manager": "MooncakeManager"},
    ),
    "engine's class renamed": Build(
        {ENGINE: {r"\bMooncakeTransferEngine\b": "SharedEngine"}}, "MooncakeTransferEngine"
    ),
}
LOCK_TAKEN_TWICE = Build({CONN: {r"session_lock = threading\.Lock\(\)": "session_lock = threading.RLock()"}}, "")


def make(build: Build, python: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Make a copy, of links, of the SGLang that `python` finds, and edit it; return what PYTHONPATH needs."""
    copy = folder / "sglang"
    copy.symlink_to(sglang_folder(python))
    for file in build.edits:
        for parent in reversed(pathlib.PurePath(file).parents):
            _open_up(copy / parent)
    for file, edits in build.edits.items():
        _edit(copy / file, edits)
    return folder


def _open_up(folder: pathlib.Path) -> None:
    """Put a folder of links in the place of a link to a folder. It shares no compiled code: that would be wrong for an
    edited file."""
    if folder.is_symlink():
        original = folder.resolve()
        folder.unlink()
        folder.mkdir()
        for entry in original.iterdir():
            if entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)


def _edit(file: pathlib.Path, edits: Mapping[str, str]) -> None:
    text = file.read_text()
    for pattern, replacement in edits.items():
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{pattern} is not in {file}"
    file.unlink()
    file.write_text(text)
