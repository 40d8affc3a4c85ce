"""Does a prefill process that probes for days keep its file descriptors, threads and memory?

FAULTS_PROBES says how many probes are sent, 5000 if unset. Run as a program, this is the prefill process: what to
probe as JSON on stdin, its levels before and after as JSON on stdout.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import types
from typing import Any

import pytest
from kit.node import Node
from kit.paths import PYTHONPATH

PROBES = int(os.environ.get("FAULTS_PROBES", "5000"))
BATCH = 100
IDLE_TIMEOUT_S = 5
# Mooncake keeps some 100 bytes for every peer it was ever asked about, so the same peers come again and again.
CLOSED = [f"127.0.{third}.{last}:1" for third in range(4) for last in range(1, 251)]
LANES = 4  # the most connections that Mooncake keeps to one node; it opens another when two reads go side by side
HOSTS_OF_LIVE = ["127.0.0.2", "127.0.0.3", "127.0.1.2", "127.0.1.3"]
# A process takes some 6000 probes to reach its size, and then changes by some 100 KiB, once or twice by 700. The bar
# for 50,000 probes is 5.8 MiB, and a leak of 200 bytes a probe is 9.5 MiB.
WARM_UP = 6 * len(CLOSED)
NOISE_BYTES, BYTES_PER_PROBE = 1 << 20, 100


@pytest.mark.timeout(320 + PROBES / 50)
def test_descriptors_threads_and_memory_stay_level_however_many_probes_are_sent(tmp_path: pathlib.Path) -> None:
    with Node("decode", tmp_path / "one") as one, Node("decode", tmp_path / "other") as other:
        live = [
            (f"{host}:{node.session.rpartition(':')[2]}", node.address)
            for node in (one, other)
            for host in HOSTS_OF_LIVE
        ]
        before, after = run_prefill(tmp_path / "prefill", live, [one.data_port, other.data_port])
    grown = after["memory"] - before["memory"]
    sent = after["probes"] - before["probes"]
    print(f"\n{sent} probes: {before} -> {after}, memory {grown / sent:+.0f} bytes a probe")
    assert sent >= PROBES
    levels = f"{sent} probes: {before} -> {after}"
    assert after["lanes"] <= 2 * LANES, f"more connections than Mooncake has lanes, {levels}"
    assert after["descriptors"] <= before["descriptors"], f"file descriptors are left open, {levels}"
    assert after["threads"] <= before["threads"], f"threads are left behind, {levels}"
    assert grown <= may_grow(sent), f"{grown / sent:.0f} bytes leak with each probe"


def may_grow(sent: int) -> int:
    """The bytes by which the process may be larger after so many probes."""
    return NOISE_BYTES + BYTES_PER_PROBE * sent


def run_prefill(
    log: pathlib.Path, live: list[tuple[str, int]], data_ports: list[int]
) -> tuple[dict[str, int], dict[str, int]]:
    """The levels of a prefill process when it is warm, and after PROBES more probes."""
    settings = {
        "PYTHONPATH": PYTHONPATH,
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
        "SGLANG_FAILED_SESSION_PROBE_SETTLE_S": "0.05",
        "SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S": str(IDLE_TIMEOUT_S),
    }
    with log.open("w") as stderr:
        ended = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([PROBES, live, data_ports]),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=300 + PROBES / 50,
            env={**os.environ, **settings},
        )
    assert ended.returncode == 0, log.read_text()[-3000:]
    before, after = json.loads(ended.stdout)
    return before, after


class Prefill:
    """A prefill manager that blacklists sessions in batches and counts its probes."""

    def __init__(self, live: dict[str, int], data_ports: list[int]) -> None:
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

        self.memory = (ctypes.c_char * 4096)()
        self.manager: Any = MooncakeKVManager(
            types.SimpleNamespace(
                kv_data_ptrs=[ctypes.addressof(self.memory)],
                kv_data_lens=[4096],
                aux_data_ptrs=[],
                aux_data_lens=[],
            ),
            "prefill",
        )
        self.live = live
        self._data_ports = data_ports
        self.probes = 0
        self._asked: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._send_probe = self.manager.engine.send_probe
        self.manager.engine.send_probe = self._count

    def _count(self, session: str) -> Any:
        with self._lock:
            self.probes += 1
            self._asked[session] += 1
        return self._send_probe(session)

    def batch(self, closed: list[str]) -> None:
        """Transfers to these and to every live peer fail; the live ones are let in, and then all of them register."""
        from sglang.srt.disaggregation.mooncake.conn import PeerMemory

        with self._lock:
            self._asked.clear()
        for session, address in self.live.items():
            self.manager.register_decode(session, PeerMemory([address]))
        for session in [*closed, *self.live]:
            with self.manager.session_lock:
                self.manager.session_failures[session] += 1
                self.manager.failed_sessions.add(session)
        deadline = time.monotonic() + 30
        while not self._asked.keys() >= set(closed) or not self.manager.failed_sessions.isdisjoint(self.live):
            not_asked = set(closed) - self._asked.keys()
            left = self.manager.failed_sessions & set(self.live)
            assert time.monotonic() < deadline, f"not asked: {len(not_asked)}, not let in: {left}"
            time.sleep(0.002)
        for session in closed:
            with self.manager.session_lock:
                self.manager.failed_sessions.discard(session)
                self.manager.session_failures.pop(session, None)
        assert not self.manager.failed_sessions

    def run(self, probes: int) -> None:
        """Blacklists batch after batch until as many more probes were sent."""
        until = self.probes + probes
        while self.probes < until:
            for start in range(0, len(CLOSED), BATCH):
                self.batch(CLOSED[start : start + BATCH])

    def levels(self, most_threads: float = float("inf")) -> dict[str, int]:
        """What the process has when it is at rest, and what sessions may leave behind for the idle timeout is gone.

        It is at rest when it has no worker threads and no more threads than that: one that has ended for the
        interpreter is there for the kernel a little longer.
        """
        time.sleep(IDLE_TIMEOUT_S + 0.1)
        self.batch(CLOSED[:1])
        deadline = time.monotonic() + 20
        while (
            "MooncakeSessionWorker" in [thread.name for thread in threading.enumerate()]
            or len(os.listdir("/proc/self/task")) > most_threads
        ):
            assert time.monotonic() < deadline, f"threads are left behind: {threading.enumerate()}"
            time.sleep(0.01)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        lanes = connections_to(self._data_ports)
        return {
            "probes": self.probes,
            "descriptors": len(os.listdir("/proc/self/fd")) - lanes,
            "lanes": lanes,
            "threads": int(fields["Threads"]),
            "memory": int(fields["VmRSS"].split()[0]) * 1024,
        }


def connections_to(ports: list[int]) -> int:
    """How many sockets of this process are connected to one of these ports."""
    with open("/proc/self/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    connected = {f"socket:[{row[9]}]" for row in rows if int(row[2].split(":")[1], 16) in ports}
    mine = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            mine.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(target in connected for target in mine)


def main() -> None:
    """The body of the prefill process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Mooncake prints
    probes, live, data_ports = json.load(sys.stdin)
    prefill = Prefill(dict(live), data_ports)
    prefill.run(WARM_UP)
    after = prefill.levels()
    for _ in range(2):  # it grows once for good when more threads than ever run side by side; a leak goes on
        before = after
        prefill.run(probes)
        after = prefill.levels(most_threads=before["threads"])
        if after["memory"] - before["memory"] <= may_grow(after["probes"] - before["probes"]):
            break
    json.dump([before, after], answers)


if __name__ == "__main__":
    main()
