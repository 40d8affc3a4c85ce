"""Is a Mooncake on TENT probed only if that does not end the process? On a Mooncake that is a Python file."""

from __future__ import annotations

import json
import pathlib
import subprocess
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from kit.fake_engine import Engine
from kit.managers import ENABLE
from sglang.srt.disaggregation.mooncake import conn, tent_probe

pytestmark = pytest.mark.slow  # each starts a process, and that another one
RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Its first line is what the file of an engine with TENT has.
ENGINE = """# 8mooncake4tent
import os, signal, time

class TransferEngine:
    def initialize(self, *arguments): return {initialize}
    def get_rpc_port(self): return 7001
    def batch_register_memory(self, *arguments): return 0
    def batch_unregister_memory(self, *arguments): return 0
    def register_memory(self, *arguments): return 0
    def send_probe(self, session):
        with open({calls!r}, "a") as calls: print(os.getpid(), session, os.environ["CUDA_VISIBLE_DEVICES"], file=calls)
        return {send_probe}
    def batch_transfer_async_read(self, *arguments): {read}
    def transfer_sync_read(self, *arguments): {read}
"""
FIXED = "0 if session == 'decode:7001' else -1"
ENDS_ITS_PROCESS = "os.kill(os.getpid(), signal.SIGSEGV)"

# A prefill manager whose one peer fails, and is asked about until it is let in or has had the time for ten probes.
PREFILL = """
import json, logging, os, sys, time, types
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
logging.getLogger("sglang").addHandler(handler)
logging.getLogger("sglang").setLevel("INFO")
from sglang.srt.disaggregation.mooncake import tent_probe
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, PeerMemory
{before}
began = time.monotonic()
nothing = types.SimpleNamespace(kv_data_ptrs=[], kv_data_lens=[], aux_data_ptrs=[], aux_data_lens=[])
manager = MooncakeKVManager(nothing, "prefill")
took_s = time.monotonic() - began
manager.register_decode("decode:7001", PeerMemory([4096]))
with manager.session_lock:
    manager.failed_sessions.add("decode:7001")
until = time.monotonic() + 2
while manager.failed_sessions and time.monotonic() < until:
    time.sleep(0.01)
is_out = "decode:7001" in list(manager.failed_sessions)
direct = manager.engine.send_probe("decode:7001")
manager.register_decode("decode:7001", PeerMemory([4096]))
manager.teardown()
print(json.dumps(dict(
    pid=os.getpid(), is_out=is_out, direct=direct, out_after_registration=len(manager.failed_sessions), took_s=took_s,
    warnings=[text for level, text in records if level == "WARNING" and not text.startswith("Session")])))
"""


class Prefill:
    """What became of a prefill process on such a Mooncake."""

    def __init__(self, ended: subprocess.CompletedProcess[str], calls: pathlib.Path) -> None:
        assert ended.returncode == 0, f"the prefill node has ended: {ended.returncode} {ended.stderr[-2000:]}"
        self.told: dict[str, Any] = json.loads(ended.stdout)
        lines = [line.split(" ") for line in calls.read_text().splitlines()] if calls.exists() else []
        self.probes = [session for pid, session, _ in lines if int(pid) == self.told["pid"]]
        self.gpus_of_child = {gpus for pid, _, gpus in lines if int(pid) != self.told["pid"]}
        self.children = {pid for pid, _, _ in lines} - {str(self.told["pid"])}


@pytest.fixture
def prefill(run_python: RunPython, tmp_path: pathlib.Path) -> Callable[..., Prefill]:
    def prefill(
        send_probe: str,
        initialize: str = "0",
        read: str = "os.abort()",
        namespace: str = "8mooncake4tent",
        before: str = "",
        **variables: str,
    ) -> Prefill:
        calls = tmp_path / "calls"
        (tmp_path / "mooncake").mkdir()
        (tmp_path / "mooncake/__init__.py").touch()
        engine = ENGINE.format(initialize=initialize, send_probe=send_probe, read=read, calls=str(calls))
        (tmp_path / "mooncake/engine.py").write_text(engine.replace("8mooncake4tent", namespace))
        on = {ENABLE: "1", "SGLANG_FAILED_SESSION_PROBE_SETTLE_S": "0.1", "CUDA_VISIBLE_DEVICES": "0"}
        return Prefill(run_python(PREFILL.format(before=before), **{**on, **variables}), calls)

    return prefill


@pytest.mark.parametrize("variable", ["MC_USE_TENT", "MC_USE_TEV1"])
@pytest.mark.parametrize("value", ["1", "0", ""])
def test_a_mooncake_that_a_probe_would_end_is_never_probed_and_one_warning_says_what_to_do(
    prefill: Callable[..., Prefill], variable: str, value: str
) -> None:
    node = prefill(ENDS_ITS_PROCESS, **{variable: value})
    assert node.probes == []
    assert node.told["is_out"]
    assert node.told["direct"] == -1, "SGLang's own probe goes through our wrapper, too"
    assert node.told["out_after_registration"] == 0
    (warning,) = node.told["warnings"]
    assert "a probe ended a child process by SIGSEGV: nothing is probed" in warning
    assert "stays out until it registers again; unset MC_USE_TENT and MC_USE_TEV1" in warning
    assert "PR 4081" in warning


def test_a_mooncake_with_the_fix_is_probed_and_nobody_is_read(prefill: Callable[..., Prefill]) -> None:
    node = prefill(FIXED, MC_USE_TENT="1")
    assert node.probes, "refused for good, though its probes work"
    assert not node.told["is_out"]
    (warning,) = node.told["warnings"]
    assert "no peer's memory is read" in warning


def test_the_trial_is_one_child_process_that_sees_no_gpu(prefill: Callable[..., Prefill]) -> None:
    node = prefill(FIXED, MC_USE_TENT="1")
    assert len(node.children) == 1
    assert node.gpus_of_child == {""}


def test_a_trial_that_hangs_ends_and_then_nothing_is_probed(prefill: Callable[..., Prefill]) -> None:
    node = prefill("time.sleep(60)", before="tent_probe._CHILD_DEADLINE_S = 1", MC_USE_TENT="1")
    assert node.probes == []
    assert "a probe did not return in a child process within 1 s" in node.told["warnings"][0]
    (child,) = node.children
    deadline = time.monotonic() + 5
    while pathlib.Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline, "the child is left behind"
        time.sleep(0.01)


@pytest.mark.parametrize("initialize", ["1", "undefined"])
def test_where_no_trial_can_be_made_nothing_is_probed(prefill: Callable[..., Prefill], initialize: str) -> None:
    node = prefill(
        FIXED, initialize=f"{initialize} if os.environ['CUDA_VISIBLE_DEVICES'] == '' else 0", MC_USE_TENT="1"
    )
    assert node.probes == []
    assert "could not be tried in a child process" in node.told["warnings"][0]


@pytest.mark.parametrize(
    ("namespace", "variables"),
    [("8mooncake4tent", {}), ("8mooncake4test", {"MC_USE_TENT": "1"})],
    ids=["unset", "built without"],
)
def test_where_tent_is_not_on_no_child_is_started(
    prefill: Callable[..., Prefill], namespace: str, variables: dict[str, str]
) -> None:
    node = prefill(FIXED, read="return 0", namespace=namespace, before="tent_probe.subprocess = None", **variables)
    assert node.children == set()
    assert node.probes
    assert node.told["warnings"] == []


def test_while_the_variables_are_not_set_nothing_is_looked_at(run_python: RunPython) -> None:
    ended = run_python(
        "from sglang.srt.disaggregation.mooncake import tent_probe\n"
        "tent_probe.importlib = tent_probe.pathlib = tent_probe.subprocess = None\n"
        "print(tent_probe.is_on(), repr(tent_probe.why_no_probe()))"
    )
    assert ended.stdout == "False ''\n", ended.stderr


def test_no_transfer_waits_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, held = threading.Lock(), []
    monkeypatch.setattr(tent_probe, "why_no_probe", lambda: held.append(lock.locked()) or "")
    manager = types.SimpleNamespace(engine=Engine(), failed_sessions=set(), session_failures={}, session_lock=lock)
    conn._prober_of(manager)
    assert not held[0], "SGLang's threads wait for session_lock meanwhile"
