"""Does Mooncake run on TENT in this process, and may it be probed then?

TENT is another engine inside Mooncake, for builds that have it and processes with one of its variables. Before
Mooncake's PR 4081 ``send_probe`` on it ends the process, so a child process tries that first.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import mmap
import os
import pathlib
import re
import signal
import subprocess
import sys

from sglang_failed_session_probe.harmless_logger import logger
from sglang_failed_session_probe.mooncake_wheels import LEAVE_TENT, TENT_VARIABLES

# The namespace mooncake::tent, as names of symbols and types have it; a build without TENT has it nowhere.
_NAMESPACE = b"8mooncake4tent"
_LIBRARY = re.compile(r"/.*/lib(?:transfer_engine|tent)[^/]*\.so[^/]*$", re.MULTILINE)
_CHILD_DEADLINE_S = 15.0
# No GPU, no RDMA device, and no port that the configuration names: the process beside it has those.
_CHILD_ENVIRONMENT = {
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"), ""),
    "MC_TENT_CONF": '{"transports": {"rdma": {"enable": false}}, "metrics": {"enabled": false}}',
}
_CHILD = """
import ctypes, json, os, sys
prctl = ctypes.CDLL(None).prctl
prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: its end leaves no core
prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: it does not outlive its parent
sys.path[:] = json.loads(sys.argv[1])
try:
    from mooncake.engine import TransferEngine
except ImportError:
    import torch  # as SGLang does before: it brings libraries of GPUs along
    from mooncake.engine import TransferEngine
engine = TransferEngine()
if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
    os._exit(1)
for port in (1, engine.get_rpc_port()):
    engine.send_probe(f"127.0.0.1:{port}")
os._exit(0)
"""


def is_on() -> bool:
    """True if one of TENT's variables is set, to whatever value, and the installed Mooncake is built with TENT.

    Then nothing may be read either: an asynchronous read overwrites a part of TENT's own batch (Mooncake's PR 4191,
    still open in September 2026).
    """
    return any(name in os.environ for name in TENT_VARIABLES) and _is_built_in()


@functools.cache
def why_no_probe() -> str:
    """What a probe on TENT did to a child process, if that forbids probing here; empty where probes are safe.

    Costs nothing while the variables are not set. Where TENT is on, the first call takes one to 15 s: hold no lock.
    """
    if not is_on():
        return ""
    command = [sys.executable, "-S", "-c", _CHILD, json.dumps(sys.path)]
    try:
        ended = subprocess.run(
            command,
            env={**os.environ, **_CHILD_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_CHILD_DEADLINE_S,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"did not return in a child process within {_CHILD_DEADLINE_S:g} s"
    except OSError as error:
        return f"could not be tried in a child process ({error})"
    if ended < 0:
        return f"ended a child process by {signal.Signals(-ended).name}"
    return "could not be tried in a child process, which had no engine" if ended else ""


def warn(mooncake: str) -> None:
    """Says at the start of a manager what TENT, which is on, means for its sessions."""
    if why_no_probe():
        logger.warning(
            "Mooncake %s runs on TENT, where a probe %s: nothing is probed, so a blacklisted session stays out until "
            "it registers again; %s",
            mooncake,
            why_no_probe(),
            LEAVE_TENT,
        )
    else:
        logger.warning(
            "Mooncake %s runs on TENT, whose reads are not safe: no peer's memory is read, and sessions are let in "
            "when they answer probes",
            mooncake,
        )


@functools.cache
def _is_built_in() -> bool:
    try:
        engine = importlib.util.find_spec("mooncake.engine")
        libraries = _LIBRARY.findall(pathlib.Path("/proc/self/maps").read_text())  # of a build that has them apart
        return any(map(_has_namespace, {engine.origin, *libraries}))  # type: ignore[union-attr]
    except Exception:  # an unknown kind of build: the child process finds out
        return True


def _has_namespace(file: str) -> bool:
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_NAMESPACE) >= 0
