"""Decode nodes that fail at random, several at a time, with transfers under way: when is each used again?

    python tools/soak.py MINUTES [SEED]        # `make soak` does so

Eight decode nodes, each on an address of its own in one network namespace, each with one fault after another: stopped,
restarted, its packets dropped or rejected, all or some, for 0.5 to 50 s, and 5 to 25 s in between. A prefill node sends
512 KiB to each every 50 ms. Prints a table; exit status 1 if a request failed that was sent after a heal, if a node was
never used again, or if the prefill node has more threads or memory at the end than it may, or does not end well.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from typing import Any

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT / "python"), str(CHECKOUT / "test")]

from kit import processes  # noqa: E402
from kit.network import Network  # noqa: E402
from kit.node import Node  # noqa: E402
from kit.paths import PYTHONPATH  # noqa: E402

NODES = 8
BLOCK, BLOCKS = 64 << 10, 8
REQUEST_EVERY_S = 0.05
SHORTEST_S, TIMES = 0.5, 100.0  # a fault lasts for up to so many times the shortest
PAUSE_S = (5.0, 25.0)
QUIET_S = 45.0  # at the end there is no fault
MOST_THREADS = 40
MOST_KIB_MORE = 20_000
DROPPED = ("all dropped", "replies dropped", "data port dropped", "cut")
FAULTS = ("stopped", "stopped", "all rejected", "data port rejected", "handshake dropped", "restarted", *DROPPED)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What was done to a node, from ``began`` to ``healed`` (seconds of the monotonic clock, as all times here)."""

    session: str
    kind: str
    began: float
    healed: float

    @property
    def group(self) -> str:
        """In which row of the table it is."""
        if self.kind not in DROPPED:
            return self.kind
        lasted_s = self.healed - self.began
        return "dropped, " + ("under 10 s" if lasted_s < 10 else "10 to 30 s" if lasted_s < 30 else "30 s and more")


# The prefill node, a process of its own. It is told "SESSION ADDRESS" when a decode node registers.


def send_to_all() -> None:
    """Prints what becomes of requests, in a line of JSON for each that failed, and for each first one that did not."""
    from sglang.srt.disaggregation.mooncake.conn import KVTransferError, MooncakeKVManager, PeerMemory

    memory = (ctypes.c_char * (BLOCK * BLOCKS))()
    here = ctypes.addressof(memory)
    regions = types.SimpleNamespace(kv_data_ptrs=[here], kv_data_lens=[len(memory)], aux_data_ptrs=[], aux_data_lens=[])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Mooncake prints
    manager = MooncakeKVManager(regions, "prefill")
    addresses: dict[str, int] = {}

    def send(session: str) -> None:
        was_served = False
        while True:
            sent, there = time.monotonic(), addresses[session]
            blocks = [(here + at, there + at, BLOCK) for at in range(0, len(memory), BLOCK)]
            outcome = "served"
            try:
                manager.send_blocks(session, blocks)
            except KVTransferError as error:
                outcome = "failed" if "Failed to send" in str(error) else "refused"
            if outcome == "failed" or (outcome == "served" and not was_served):
                answers.write(json.dumps([session, outcome, sent, time.monotonic()]) + "\n")
            was_served = outcome == "served"
            time.sleep(REQUEST_EVERY_S)

    print("ready", file=answers)
    for line in sys.stdin:
        session, address = line.split()
        manager.register_decode(session, PeerMemory([int(address)]))
        is_new = session not in addresses
        addresses[session] = int(address)
        if is_new:
            threading.Thread(target=send, args=(session,), daemon=True).start()
    manager.teardown()


# The faults.


class Soak:
    """One run. ``faults`` and ``requests`` grow meanwhile."""

    def __init__(self, network: Network, folder: pathlib.Path) -> None:
        self.network, self.folder = network, folder
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, float, float]] = []  # session, outcome, sent, ended
        self._telling = threading.Lock()
        with (folder / "prefill.log").open("w") as log:
            self.prefill = processes.start(
                [sys.executable, __file__, "prefill"],
                network.path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": PYTHONPATH,
                    "MOONCAKE_PROTOCOL": "tcp",
                    "MC_TRANSFER_TIMEOUT": "5",
                    "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
                },
            )
        assert self.prefill.stdout is not None
        assert self.prefill.stdout.readline() == "ready\n", (folder / "prefill.log").read_text()[-2000:]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.prefill.stdout is not None
        for line in self.prefill.stdout:
            session, outcome, sent, ended = json.loads(line)
            self.requests.append((session, outcome, sent, ended))

    def register(self, decode: Node) -> None:
        assert self.prefill.stdin is not None
        with self._telling:
            self.prefill.stdin.write(f"{decode.session} {decode.address}\n")
            self.prefill.stdin.flush()

    def threads_and_kib(self) -> tuple[int, int]:
        """Of the prefill node."""
        process = pathlib.Path("/proc", str(self.prefill.pid))
        pages = int((process / "statm").read_text().split()[1])
        return len(list((process / "task").iterdir())), pages * os.sysconf("SC_PAGESIZE") // 1024

    def play(self, number: int, seed: float, until: float) -> None:
        """All that happens to one decode node, in a thread of its own."""
        chance = random.Random(seed)
        ports = (20001 + 10 * number, 20000 + 10 * number)
        log = self.folder / f"decode{number}"
        with Node("decode", log, self.network.path, ports, SGLANG_HOST_IP=f"127.0.1.{number + 1}") as decode:
            self.register(decode)
            while True:
                pause_s, lasts_s = chance.uniform(*PAUSE_S), SHORTEST_S * TIMES ** chance.random()
                kind = chance.choice(FAULTS)
                if time.monotonic() + pause_s + lasts_s > until - QUIET_S:
                    break
                time.sleep(pause_s)
                began = time.monotonic()
                if kind == "restarted":
                    decode.restart()
                    self.register(decode)
                else:
                    with self._fault(decode, kind):
                        time.sleep(lasts_s)
                self.faults.append(Fault(decode.session, kind, began, time.monotonic()))
            time.sleep(max(0.0, until - time.monotonic()))

    def _fault(self, decode: Node, kind: str) -> contextlib.AbstractContextManager[Any]:
        handshake, data = decode.handshake_port, decode.data_port
        if kind == "stopped":
            return decode.stopped()
        if kind == "cut":
            return self.network.cut(handshake, data)
        ports = {"data": (data,), "handshake": (handshake,)}.get(kind.partition(" ")[0], (handshake, data))
        if kind.endswith("rejected"):
            return self.network.rejected(*ports)
        return self.network.dropped(*ports, direction="back" if kind.startswith("replies") else "to")

    def result(self, until: float) -> tuple[dict[str, list[str]], list[str]]:
        """The rows of the table by group, and what must not be. The decode nodes ended at ``until``."""
        requests = [request for request in self.requests if request[3] < until]
        lags = collections.defaultdict(list)
        overtaken: collections.Counter[str] = collections.Counter()
        wrong = []
        for fault in self.faults:
            mine = [request[1:] for request in requests if request[0] == fault.session]
            later = [other.began for other in self.faults if other.session == fault.session]
            next_began = min((began for began in later if began > fault.began), default=float("inf"))
            earlier = [outcome for outcome, _, ended in mine if ended < fault.began]
            failed = [
                ended
                for outcome, sent, ended in mine
                if outcome == "failed" and sent < fault.healed and fault.began <= ended < next_began
            ]
            if (earlier and earlier[-1] == "failed") or not failed:
                continue  # it was still out, or no request failed
            begins = max(fault.healed, min(failed))
            served = [sent for outcome, sent, ended in mine if outcome == "served" and begins <= ended < next_began]
            if served:
                lags[fault.group].append(max(0.0, served[0] - begins))
            elif next_began < float("inf"):
                overtaken[fault.group] += 1
            else:
                wrong.append(f"never used again: {fault}")
            wrong += [
                f"a request failed that was sent {sent - fault.healed:.1f} s after the heal: {fault}"
                for outcome, sent, ended in mine
                if outcome == "failed" and fault.healed < sent and ended < next_began and fault.kind != "restarted"
            ]
        rows = {
            group: [
                str(len(found) + overtaken[group]),
                f"{statistics.median(found):.2f} s",
                f"{max(found):.2f} s",
                str(overtaken[group]),
            ]
            for group, found in sorted(lags.items())
        }
        return rows, wrong


def main(minutes: float, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder, Network() as network:
        chance = random.Random(seed)
        soak = Soak(network, pathlib.Path(folder))
        until = time.monotonic() + 60.0 * minutes
        nodes = [threading.Thread(target=soak.play, args=(n, chance.random(), until)) for n in range(NODES)]
        for node in nodes:
            node.start()
        time.sleep(20.0)
        _, kib_before = soak.threads_and_kib()
        for node in nodes:
            node.join()
        threads, kib = soak.threads_and_kib()
        rows, wrong = soak.result(until)
        if threads > MOST_THREADS:
            wrong.append(f"the prefill node has {threads} threads")
        if kib > kib_before + MOST_KIB_MORE:
            wrong.append(f"the prefill node has grown from {kib_before} to {kib} KiB")
        assert soak.prefill.stdin is not None
        soak.prefill.stdin.close()  # so it tears its manager down
        if status := soak.prefill.wait(timeout=20):
            wrong.append(f"the prefill node ended with {status}")
        print(f"{len(soak.faults)} faults; {threads} threads; {kib_before} KiB at first, {kib} at the end\n")
        print("| fault | outages | median | worst | next fault came first |\n| --- | ---: | ---: | ---: | ---: |")
        for group, cells in rows.items():
            print(f"| {' | '.join([group, *cells])} |")
        print(*(f"\nWRONG: {what}" for what in wrong), sep="")
        if wrong:
            print((soak.folder / "prefill.log").read_text()[-20_000:])
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["prefill"]:
        send_to_all()
    else:
        sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
