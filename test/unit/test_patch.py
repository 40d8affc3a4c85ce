"""How do our files get into a running SGLang and out again? On small packages that look like SGLang to the patch.

Each story runs in a Python of its own. The fake class notes what it was made of, and `is_sglangs_own` compares.
"""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import threading
from collections.abc import Callable

import pytest
from kit.paths import PYTHON_FOLDER
from sglang_failed_session_probe import SWITCH as ENABLE
from sglang_failed_session_probe import own_files, patch

PTH_LINE = (PYTHON_FOLDER / "sglang_failed_session_probe.pth").read_text().strip()
ON = {ENABLE: "1", "SGLANG_FAILED_SESSION_PROBE_SETTLE_S": "0.02"}

ENGINE = """
class Mooncake:
    def send_probe(self, session):
        return 0

class MooncakeTransferEngine:
    def __init__(self):
        self.engine = Mooncake()

ORIGINAL = dict(vars(MooncakeTransferEngine))
"""

CONN = """
import collections, logging, threading

logger = logging.getLogger(__name__)

class MooncakeKVManager:
    def __init__(self, args, disaggregation_mode, server_args=None, is_mla_backend=False):
        from sglang.srt.distributed.device_communicators import mooncake_transfer_engine
        self.engine = mooncake_transfer_engine.MooncakeTransferEngine()
        if disaggregation_mode == "prefill":
            self.failed_sessions = set()
            self.session_failures = collections.defaultdict(int)
            self.session_lock = threading.Lock()

ORIGINAL = dict(vars(MooncakeKVManager))
"""

AFTER_IT_IS_MADE = CONN.replace("set()\n", "set()\n            {}\n")
TO_A_THREAD = (
    "threading.Thread(target=lambda _: threading.Event().wait(), args=[self.failed_sessions], daemon=True).start()"
)

ENVIRON = """
class EnvField:
    def __init__(self, default):
        self.default = default

class EnvBool(EnvField): pass
class EnvInt(EnvField): pass
class EnvFloat(EnvField): pass

class Envs:
    SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S = "SGLang's own"

ORIGINAL = dict(vars(Envs))
"""

CONN_FILE = "srt/disaggregation/mooncake/conn.py"
ENGINE_FILE = "srt/distributed/device_communicators/mooncake_transfer_engine.py"
OLD_ENGINE_FILE = "srt/disaggregation/mooncake/transfer_engine.py"  # to 0.5.8.post1
ENVIRON_FILE = "srt/environ.py"  # from 0.5.3.post3 on

SCENE = """
import logging, sys, threading, time
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from sglang_failed_session_probe import activate, deactivate

def conn():
    import sglang.srt.disaggregation.mooncake.conn as conn
    return conn

def engine():
    import sglang.srt.distributed.device_communicators.mooncake_transfer_engine as engine
    return engine

def is_sglangs_own():
    return (vars(conn().MooncakeKVManager) == conn().ORIGINAL
            and vars(engine().MooncakeTransferEngine) == engine().ORIGINAL)

def prefill():
    return conn().MooncakeKVManager(None, "prefill")

def heals(manager):
    with manager.session_lock:
        manager.failed_sessions.add("decode:7001")
    deadline = time.monotonic() + 10
    while manager.failed_sessions and time.monotonic() < deadline:
        time.sleep(0.005)
    return not manager.failed_sessions

def probe_threads():
    return sum(thread.name == "MooncakeFailedSessionProbe" for thread in threading.enumerate())
"""

Story = Callable[..., list[str]]


@pytest.fixture
def story(tmp_path: pathlib.Path, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Story:
    """Writes a fake SGLang and lets a script run in it; gives the lines of the log. Other files replace the usual."""

    def tell(script: str, files: dict[str, str] | None = None, environment: dict[str, str] = ON) -> list[str]:
        sglang = tmp_path / "sglang"
        usual = {
            "__init__.py": "__version__ = '9.9'",
            "srt/disaggregation/mooncake/__init__.py": "",
            "srt/distributed/__init__.py": "",
            CONN_FILE: CONN,
            ENGINE_FILE: ENGINE,
        }
        for name, text in {**usual, **(files or {})}.items():
            (sglang / name).parent.mkdir(parents=True, exist_ok=True)
            (sglang / name).write_text(text)
        told = run_python(SCENE + script, **environment)
        assert told.returncode == 0, told.stdout + told.stderr
        assert told.stderr == ""
        return told.stdout.splitlines()

    return tell


def errors(lines: list[str]) -> list[str]:
    trouble = [line for line in lines if line.startswith(("ERROR", "WARNING", "CRITICAL"))]
    return [line for line in trouble if "is blacklisted" not in line]


# Into SGLang and out again.


@pytest.mark.parametrize("order", ["activate(); conn(); engine()", "conn(); engine(); activate()"])
def test_sglang_heals_once_activated_before_or_after_its_import_and_is_itself_again_after_deactivate(
    order: str, story: Story
) -> None:
    lines = story(f"""
{order}
assert not is_sglangs_own()
assert heals(prefill())
assert probe_threads() == 1
deactivate()
assert is_sglangs_own()
assert probe_threads() == 1
assert type(prefill().failed_sessions) is set
""")
    assert errors(lines) == []
    (active,) = [line for line in lines if "is active" in line]
    assert "SGLang 9.9, Mooncake " in active
    assert "interval=30s" in active


def test_a_second_activate_changes_nothing_and_one_after_deactivate_activates_again(story: Story) -> None:
    story("""
activate(); activate()
once = dict(vars(conn().MooncakeKVManager))
activate()
assert vars(conn().MooncakeKVManager) == once
assert conn().MooncakeKVManager.__init__.__wrapped__ is conn().ORIGINAL["__init__"]
deactivate(); deactivate()
assert is_sglangs_own()
activate()
assert conn().MooncakeKVManager.__init__.__wrapped__ is conn().ORIGINAL["__init__"]
assert heals(prefill())
deactivate()
assert is_sglangs_own()
""")


def test_deactivate_before_the_import_leaves_sglang_as_it_is_and_so_does_one_without_activate(story: Story) -> None:
    story("""
deactivate(); activate(); deactivate()
assert is_sglangs_own()
assert type(prefill().failed_sessions) is set
""")


NO_WRAPT = """
import sys

class NoWrapt:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "wrapt":
            raise ModuleNotFoundError("No module named 'wrapt'")

sys.modules.pop("wrapt", None)
sys.modules.pop("sglang_failed_session_probe.patch", None)
sys.meta_path.insert(0, NoWrapt)
activate(); activate()
"""


def test_where_wrapt_is_found_only_after_the_pth_files_sglang_is_patched_when_it_is_imported(story: Story) -> None:
    """As where it lies in the system's folder, and we in that of a user or a venv."""
    lines = story(f"""
{NO_WRAPT}
sys.meta_path.remove(NoWrapt)
assert heals(prefill())
assert not is_sglangs_own()
deactivate()
assert is_sglangs_own()
assert not any("sglang_failed" in str(getattr(finder, "__module__", "")) for finder in sys.meta_path)
""")
    assert errors(lines) == []


def test_where_wrapt_is_not_there_at_all_that_is_one_error_and_sglang_runs_on_unpatched(story: Story) -> None:
    lines = story(f"""
{NO_WRAPT}
assert type(prefill().failed_sessions) is set
assert is_sglangs_own()
""")
    (error,) = errors(lines)
    assert "NOT active: it cannot be loaded" in error


def test_an_installation_whose_files_are_gone_takes_no_module_of_sglangs_for_its_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").touch()
    monkeypatch.setattr(own_files, "_PACKAGE", tmp_path / "sglang_failed_session_probe")
    assert own_files.file_of(own_files.CONN).is_relative_to(tmp_path / "sglang_failed_session_probe")


def test_our_new_modules_are_found_beside_sglangs_only_while_active(story: Story) -> None:
    lines = story("""
activate()
import sglang.srt.disaggregation.mooncake.session_probe
print(sglang.srt.disaggregation.mooncake.session_probe.__file__)
deactivate()
try:
    import sglang.srt.observability.failed_session_metrics
except ModuleNotFoundError as error:
    print(error)
""")
    assert lines == [
        str(PYTHON_FOLDER / "sglang/srt/disaggregation/mooncake/session_probe.py"),
        "No module named 'sglang.srt.observability'",
    ]


def test_the_engine_of_older_releases_can_probe_too(story: Story) -> None:
    story(
        """
from sglang.srt.disaggregation.mooncake.transfer_engine import MooncakeTransferEngine, ORIGINAL
activate()
assert MooncakeTransferEngine().send_probe("decode:7001") == 0
deactivate()
assert vars(MooncakeTransferEngine) == ORIGINAL
""",
        {OLD_ENGINE_FILE: ENGINE},
    )


def test_the_settings_are_fields_of_sglangs_envs_where_it_has_them_and_lacks_ours(story: Story) -> None:
    story(
        """
from sglang.srt import environ
activate()
field = environ.Envs.SGLANG_FAILED_SESSION_PROBE_INTERVAL_S
assert (type(field).__name__, field.name, field.default) == ("EnvFloat", "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S", 30.0)
assert type(environ.Envs.SGLANG_ENABLE_FAILED_SESSION_PROBE).__name__ == "EnvBool"
assert type(environ.Envs.SGLANG_FAILED_SESSION_PROBE_CONCURRENCY).__name__ == "EnvInt"
assert environ.Envs.SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S == "SGLang's own"
assert heals(prefill())
deactivate()
assert vars(environ.Envs) == environ.ORIGINAL
""",
        {ENVIRON_FILE: ENVIRON},
    )


# Releases with a native probe.

NATIVE_CONN = """
import collections, threading

runs = threading.Semaphore(0)

class MooncakeKVManager:
    def __init__(self, args, disaggregation_mode):
        from sglang.srt.distributed.device_communicators import mooncake_transfer_engine
        self.engine = mooncake_transfer_engine.MooncakeTransferEngine()
        self.failed_sessions = set()
        self.session_failures = collections.defaultdict(int)
        self.session_lock = threading.Lock()
        self._failed_session_probe_shutdown = threading.Event()
        loop = self._failed_session_probe_loop
        threading.Thread(target=loop, name="MooncakeFailedSessionProbe", daemon=True).start()

    def _failed_session_probe_loop(self):
        print("the native loop runs", flush=True)
        runs.release()
        self._failed_session_probe_shutdown.wait()

ORIGINAL = dict(vars(MooncakeKVManager))
"""


def test_a_native_probe_thread_runs_our_loop_and_stays_the_only_one(story: Story) -> None:
    lines = story(
        "activate(); assert heals(prefill()); assert probe_threads() == 1",
        {CONN_FILE: NATIVE_CONN},
    )
    assert "the native loop runs" not in lines


def test_where_the_patch_does_not_fit_a_native_probe_goes_on_as_before(story: Story) -> None:
    lines = story(
        "activate(); prefill(); assert conn().runs.acquire(timeout=10)\n"
        "assert probe_threads() == 1; assert is_sglangs_own()",
        {CONN_FILE: NATIVE_CONN.replace("set()", "{}")},
    )
    assert "the native loop runs" in lines
    assert len(errors(lines)) == 1


WRAPPED_LOCK = """
class WrappedLock:
    def __init__(self): self.lock = threading.Lock()
    def __enter__(self): self.lock.acquire()
    def __exit__(self, *_): self.lock.release()
"""


def test_a_lock_that_somebody_has_wrapped_is_as_good(story: Story) -> None:
    """As one that measures how long it is held."""
    wrapped = CONN.replace("threading.Lock()", "WrappedLock()") + WRAPPED_LOCK
    assert errors(story("activate(); assert heals(prefill())", {CONN_FILE: wrapped})) == []


# A release that is not as we know it: one ERROR, and SGLang runs on unpatched.


def test_two_threads_that_find_the_same_thing_missing_say_it_once(caplog: pytest.LogCaptureFixture) -> None:
    """The native probe's thread and the constructor may look at the same time."""
    both_looked = threading.Barrier(2)

    class Patch(patch.Patch):
        @property
        def active(self) -> bool:
            found = self.is_active
            with contextlib.suppress(threading.BrokenBarrierError):
                both_looked.wait(0.5)
            return found

        @active.setter
        def active(self, value: bool) -> None:
            self.is_active = value

    given_up = Patch()
    threads = [threading.Thread(target=given_up.give_up, args=("session_lock",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len([line for line in caplog.messages if "is NOT active" in line]) == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({CONN_FILE: CONN.replace("set()", "{}")}, "set MooncakeKVManager.failed_sessions (it is a dict)"),
        ({CONN_FILE: CONN.replace("session_lock", "lock")}, "MooncakeKVManager.session_lock"),
        ({CONN_FILE: CONN.replace("threading.Lock", "threading.Event")}, "session_lock (it is a Event)"),
        ({CONN_FILE: CONN.replace("collections.defaultdict(int)", "[]")}, "dict MooncakeKVManager.session_failures"),
        ({CONN_FILE: AFTER_IT_IS_MADE.format("self.dead = self.failed_sessions")}, "without a second name"),
        ({CONN_FILE: AFTER_IT_IS_MADE.format("self.is_dead = self.failed_sessions.__contains__")}, "second name"),
        ({CONN_FILE: AFTER_IT_IS_MADE.format(TO_A_THREAD)}, "without a second name"),
        ({CONN_FILE: CONN.replace("disaggregation_mode", "mode")}, "MooncakeKVManager.__init__"),
        ({CONN_FILE: CONN + "_blacklist = 'taken'"}, "_blacklist"),
        ({CONN_FILE: CONN + "def _received(): pass"}, "_received"),
        ({ENVIRON_FILE: ENVIRON.replace("EnvFloat", "EnvDouble")}, "sglang.srt.environ"),
    ],
    ids=[
        "dict",
        "no lock",
        "lock of another kind",
        "failures of another kind",
        "second name",
        "method kept",
        "handed to a thread",
        "no role",
        "name taken",
        "function taken",
        "no field type",
    ],
)
def test_a_patch_point_that_is_missing_is_one_error_and_sglang_runs_on_unpatched(
    files: dict[str, str], said: str, story: Story
) -> None:
    lines = story(
        """
activate()
prefill(); prefill()
assert is_sglangs_own()
assert probe_threads() == 0
""",
        files,
    )
    (error,) = errors(lines)
    assert error.startswith("ERROR Failed-session probe is NOT active")
    assert "SGLang 9.9" in error
    assert any(said in line for line in lines), "an operator is not told what is missing"


@pytest.mark.parametrize(
    "conn",
    [
        CONN.replace("session_lock", "lock"),
        NATIVE_CONN.replace("session_lock", "lock"),
        CONN.replace("MooncakeKVManager", "Manager"),
        CONN + "_blacklist = 'taken'",
    ],
    ids=["no lock", "no lock, native", "no class", "name taken"],
)
def test_what_fails_while_the_patch_steps_aside_does_not_reach_sglang(conn: str, story: Story) -> None:
    """A filter of the operator's may raise, and somebody else may have taken away what the patch takes back."""
    story(
        """
def fails(record):
    raise RuntimeError("broken")

logging.getLogger("sglang_failed_session_probe.patch").addFilter(fails)
activate()
del engine().MooncakeTransferEngine.send_probe
manager = getattr(conn(), "MooncakeKVManager", None) or conn().Manager
manager(None, "prefill")
assert vars(manager) == conn().ORIGINAL
""",
        {CONN_FILE: conn},
    )


def test_a_lock_that_its_thread_may_take_twice_will_do(story: Story) -> None:
    story("activate(); assert heals(prefill())", {CONN_FILE: CONN.replace("threading.Lock", "threading.RLock")})


def test_a_release_without_the_class_is_one_error_that_names_it(story: Story) -> None:
    lines = story(
        "conn(); activate(); assert not hasattr(engine().MooncakeTransferEngine, 'send_probe')",
        {CONN_FILE: CONN.replace("MooncakeKVManager", "MooncakeManager")},
    )
    (error,) = errors(lines)
    assert "SGLang 9.9 has no sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager" in error


def test_a_name_that_sglang_has_taken_stays_sglangs(story: Story) -> None:
    story(
        """
activate()
assert conn()._blacklist == "taken"
assert not hasattr(conn(), "_FailedSessionProber")
""",
        {CONN_FILE: CONN + "_blacklist = 'taken'"},
    )


# Settings.


@pytest.mark.parametrize(("name", "value"), [("SGLANG_FAILED_SESSION_PROBE_INTERVAL_S", "nan"), (ENABLE, "maybe")])
def test_a_wrong_setting_stops_a_prefill_node_with_one_sentence_and_lets_a_decode_node_be(
    name: str, value: str, story: Story
) -> None:
    lines = story(
        """
activate()
conn().MooncakeKVManager(None, "decode")
try:
    prefill()
except ValueError as error:
    print(error)
assert probe_threads() == 0
""",
        environment={**ON, name: value},
    )
    (sentence,) = lines
    assert sentence.startswith(f"{name}='{value}' is not allowed: set it to ")


IMPORTED = """
import os, sys
before = set(sys.modules)
for word in {words}:
    os.environ["SGLANG_ENABLE_FAILED_SESSION_PROBE"] = word
    {start}
    print(os.environ["SGLANG_ENABLE_FAILED_SESSION_PROBE"])
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names))
"""
PLUGIN = "import sglang_failed_session_probe; sglang_failed_session_probe.activate()"


@pytest.mark.parametrize("start", [PLUGIN, PTH_LINE], ids=["plugin", "pth"])
@pytest.mark.parametrize(
    ("words", "sglang_reads", "imported"),
    [
        (["0", "false", "No", "n", "OFF"], "0", ["sglang_failed_session_probe"]),
        (["1", "true", "Yes", "y", "ON"], "1", ["sglang_failed_session_probe", "wrapt"]),
    ],
    ids=["off", "on"],
)
def test_sglang_reads_the_switch_as_we_do_and_a_door_imports_as_little_as_it_can(
    start: str,
    words: list[str],
    sglang_reads: str,
    imported: list[str],
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """SGLang knows fewer words than we allow; neither it nor prometheus_client nor Mooncake may be imported yet."""
    ended = run_python(IMPORTED.format(words=words, start=start))
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [sglang_reads] * 5 + [str(imported)]


@pytest.mark.parametrize(
    ("start", "imported"), [(PLUGIN, ["sglang_failed_session_probe"]), (PTH_LINE, [])], ids=["plugin", "pth"]
)
def test_with_the_switch_unset_or_empty_a_door_imports_nothing(
    start: str, imported: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    unset = f"del os.environ[{ENABLE!r}]; {start}; os.environ[{ENABLE!r}] = ''; {start}"
    ended = run_python(IMPORTED.format(words=[""], start=unset))
    assert (ended.stderr, ended.stdout) == ("", f"\n{imported}\n")


def test_prometheus_is_imported_when_the_first_prefill_manager_is_made_and_not_before(story: Story) -> None:
    """The launcher imports SGLang's conn before it has chosen where metrics are stored."""
    story("""
activate(); conn(); engine()
conn().MooncakeKVManager(None, "decode")
assert "prometheus_client" not in sys.modules
prefill()
from prometheus_client import REGISTRY
assert REGISTRY.get_sample_value("sglang:failed_session_recoveries_total") == 0
""")
