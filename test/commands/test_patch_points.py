"""Does the static check say of a release what the patch would find at run time?"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from kit import changed_sglang
from kit.paths import PYTHON_FOLDER
from kit.releases import RELEASES, environment
from sglang_failed_session_probe import SWITCH, patch_points
from sglang_failed_session_probe.own_files import CONN as CONN_MODULE
from sglang_failed_session_probe.own_files import OLD_ENGINE

EDITED = ["0.5.12.post1", "0.5.23"]
CONN = "srt/disaggregation/mooncake/conn.py"
ENGINE = "srt/distributed/device_communicators/mooncake_transfer_engine.py"
ENVIRON = "srt/environ.py"


def stock(release: str) -> pathlib.Path:
    python = environment.python(f"sglang-{release}")
    (site,) = python.parent.parent.glob("lib/python3*/site-packages")
    return site / "sglang"


def edited(release: str, edits: dict[str, str], folder: pathlib.Path, file: str = CONN) -> patch_points.PatchPoints:
    """What is found in a copy of a release that is edited in one file."""
    python = environment.python(f"sglang-{release}")
    return patch_points.examine(changed_sglang.make(changed_sglang.Build({file: edits}, ""), python, folder) / "sglang")


# Stock releases.


@pytest.mark.parametrize("release", RELEASES)
def test_it_fits_a_stock_release_and_every_finding_is_where_it_says(release: str) -> None:
    folder = stock(release)
    points = patch_points.examine(folder)
    assert (points.release, points.missing, points.doubts) == (release, (), ())
    assert points.fits
    assert points.has("native probe") == points.has("teardown") == (release == "0.5.23")
    assert points.has("plugins") == (release in EDITED)
    for finding in points.findings:
        if finding.found and finding.name.split(".")[-1] not in ("conn", "plugins"):
            file, line = finding.where.rsplit(":", 1)
            words = re.findall(r"\w+", finding.name)
            shown = "\n".join((folder.parent / file).read_text().splitlines()[int(line) - 1 : int(line) + 7])
            assert any(word in shown for word in (words[0], "def ")), f"{finding.name} is not at {finding.where}"


@pytest.mark.parametrize("release", RELEASES)
def test_it_names_the_methods_that_write_the_blacklist(release: str) -> None:
    names = {finding.name for finding in patch_points.examine(stock(release)).findings}
    lifted = "discard in _unblacklist_session" if release == "0.5.23" else "remove in start_prefill_thread"
    assert {"failed_sessions: add in transfer_worker", f"failed_sessions: {lifted}"} <= names


# What is missing: as at run time.


@pytest.mark.parametrize("release", EDITED)
@pytest.mark.parametrize("build", changed_sglang.BUILDS)
def test_what_makes_the_patch_give_up_is_missing(build: str, release: str, tmp_path: pathlib.Path) -> None:
    python = environment.python(f"sglang-{release}")
    points = patch_points.examine(changed_sglang.make(changed_sglang.BUILDS[build], python, tmp_path) / "sglang")
    assert not points.fits
    assert changed_sglang.BUILDS[build].missing in " ".join(points.missing)
    assert points.release == release


SMALL = {
    "__init__.py": "__version__ = '9.9'",
    "version.py": "__version__ = '9.9'",
    "srt/disaggregation/mooncake/__init__.py": "",
    "srt/distributed/__init__.py": "",
    CONN: """
import collections, logging, threading
from sglang.srt.disaggregation.base import Base

class MooncakeKVManager(Base):
    def __init__(self, args, disaggregation_mode):
        self.init_engine()
        if disaggregation_mode == "prefill":
            self.failed_sessions = set()
            self.session_failures = collections.defaultdict(int)
            self.session_lock = threading.Lock()

    def transfer_worker(self, session):
        with self.session_lock:
            self.failed_sessions.add(session)
""",
    "srt/disaggregation/base.py": """
class Base:
    def init_engine(self):
        from sglang.srt.distributed.device_communicators import mooncake_transfer_engine
        self.engine = mooncake_transfer_engine.MooncakeTransferEngine()
""",
    ENGINE: "class MooncakeTransferEngine: pass",
    ENVIRON: """
class EnvBool:
    def __init__(self, default):
        self.default = default

class EnvInt(EnvBool): pass
class EnvFloat(EnvBool): pass
class Envs: pass
""",
}
AT_RUN_TIME = """
import logging, sys
logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stdout)
from sglang_failed_session_probe import activate
activate()
from sglang.srt.disaggregation.mooncake import conn
getattr(conn, "MooncakeKVManager", lambda *_: None)(None, "prefill")
"""


def small(folder: pathlib.Path, edits: dict[str, tuple[str, str]]) -> pathlib.Path:
    """A small package that looks like SGLang to the patch, edited: file -> (text, other text)."""
    for name, text in SMALL.items():
        file = folder / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        before, after = edits.get(name, ("", ""))
        assert before in text
        file.write_text(text.replace(before, after) if before else text)
    return folder / "sglang"


@pytest.mark.parametrize(
    "edits",
    [
        {CONN: ("failed_sessions", "dead_sessions")},
        {CONN: ("set()", "{}")},
        {CONN: ("set()", "collections.OrderedDict()")},
        {CONN: ("failed_sessions = set()", "failed_sessions = self.dead = set()")},
        {CONN: ("set()\n", "set()\n            self.dead = self.failed_sessions\n")},
        {CONN: ("session_failures", "failures")},
        {CONN: ("session_lock", "guard")},
        {CONN: ("self.init_engine()", "pass"), "srt/disaggregation/base.py": ("self.engine", "engine")},
        {CONN: ("disaggregation_mode", "mode")},
        {CONN: ("class MooncakeKVManager", "class Manager")},
        {ENGINE: ("MooncakeTransferEngine", "SharedEngine")},
    ],
    ids=lambda edits: " ".join(after for _, after in edits.values()),
)
def test_the_words_are_those_of_the_error_line(edits: dict[str, tuple[str, str]], tmp_path: pathlib.Path) -> None:
    folder = small(tmp_path, edits)
    ended = subprocess.run(
        [sys.executable, "-c", AT_RUN_TIME],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")},
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHON_FOLDER}",
            SWITCH: "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = re.search(r"SGLang 9\.9 has no (.*)\. SGLang runs on", ended.stdout)
    assert said, ended.stdout + ended.stderr
    assert said.group(1) in patch_points.examine(folder).missing


@pytest.mark.parametrize(
    ("edits", "missing"),
    [
        ({CONN: ("\nclass", "\n_blacklist = 1\n\nclass")}, f"free name _blacklist in {CONN_MODULE}"),
        ({ENVIRON: ("EnvFloat", "EnvDouble")}, "sglang.srt.environ.EnvFloat"),
        ({CONN: ("        if disaggregation_mode", "if (")}, f"{CONN_MODULE} that can be read"),
    ],
    ids=["name taken", "no field type", "cannot be read"],
)
def test_what_makes_the_patch_raise_is_missing_too(
    edits: dict[str, tuple[str, str]], missing: str, tmp_path: pathlib.Path
) -> None:
    assert missing in patch_points.examine(small(tmp_path, edits)).missing


def test_a_name_that_is_taken_in_the_module_that_the_engine_was_in_up_to_0_5_8_is_missing(
    tmp_path: pathlib.Path,
) -> None:
    folder = small(tmp_path, {})
    older = folder / "srt/disaggregation/mooncake/transfer_engine.py"
    older.write_text("class MooncakeTransferEngine: pass\n\ndef send_probe(): pass\n")
    assert patch_points.examine(folder).missing == (f"free name send_probe in {OLD_ENGINE}",)


def test_a_small_release_fits_wherever_its_classes_have_the_attributes_from(tmp_path: pathlib.Path) -> None:
    init = "import threading\nclass Base:\n    def __init__(self):\n        self.session_lock = threading.Lock()\n"
    in_base_class = {
        CONN: ("            self.session_lock = threading.Lock()\n", ""),
        "srt/disaggregation/base.py": ("class Base:", init),
    }
    points = patch_points.examine(small(tmp_path, in_base_class))
    assert (points.missing, points.doubts) == ((), ())


def test_what_only_a_decode_manager_has_is_missing(tmp_path: pathlib.Path) -> None:
    pattern = r"DisaggregationMode\.PREFILL(:\n +self\.session_failures = )"
    points = edited("0.5.23", {pattern: r"DisaggregationMode.DECODE\1"}, tmp_path)
    assert "MooncakeKVManager.failed_sessions" in points.missing


# What is odd, and may work.

DOUBTS = {
    "no lock of threading": (
        {r"session_lock = threading\.Lock\(\)": "session_lock = asyncio.Lock()"},
        "session_lock is no threading.Lock() but asyncio.Lock()",
    ),
    "no dict": (
        {r"session_failures = defaultdict\(int\)": "session_failures = Failures()"},
        "session_failures is no dict but Failures()",
    ),
    "nothing adds": (
        {r"failed_sessions\.add\(": "failed_sessions.union("},
        "nothing adds to MooncakeKVManager.failed_sessions",
    ),
    "made anew": (
        {r"( +)(def get_session_id\(self\):)": r"\1def forget_all(self):\n\1\1self.failed_sessions = set()\n\n\1\2"},
        "MooncakeKVManager.failed_sessions is made anew in forget_all",
    ),
}


@pytest.mark.parametrize("release", EDITED)
@pytest.mark.parametrize(("edits", "doubt"), DOUBTS.values(), ids=DOUBTS)
def test_it_doubts_a_release_in_which_the_probe_might_not_heal(
    edits: dict[str, str], doubt: str, release: str, tmp_path: pathlib.Path
) -> None:
    points = edited(release, edits, tmp_path)
    assert not points.fits
    assert points.missing == ()
    assert doubt in " ".join(points.doubts)
    assert f"{CONN}:" in " ".join(points.doubts) or "nothing adds" in doubt


def test_it_doubts_a_release_whose_engine_class_is_elsewhere(tmp_path: pathlib.Path) -> None:
    folder = small(tmp_path, {})
    (folder / ENGINE).unlink()
    assert patch_points.examine(folder).doubts == ("MooncakeTransferEngine is in neither of its two modules",)


def test_a_lock_that_its_thread_may_take_twice_is_none_to_doubt(tmp_path: pathlib.Path) -> None:
    assert patch_points.examine(small(tmp_path, {CONN: ("threading.Lock()", "threading.RLock()")})).fits


# Where SGLang is.


def test_a_folder_without_init_is_no_sglang(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    assert patch_points.find_sglang() is None
    small(tmp_path, {})
    assert patch_points.find_sglang() == tmp_path / "sglang"


def test_the_release_is_what_sglang_would_say(tmp_path: pathlib.Path) -> None:
    folder = small(tmp_path, {})
    (folder / "_version.py").write_text("__version__ = version = '9.9.1'\n")
    assert patch_points.release_of(folder) == "9.9.1"
    (folder / "_version.py").unlink()
    (folder / "version.py").write_text("from somewhere import __version__\n")
    metadata = tmp_path / "sglang-9.9.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9.2\n")
    assert patch_points.release_of(folder) == "9.9.2"
