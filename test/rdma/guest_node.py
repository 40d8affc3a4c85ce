"""A node in a machine with RDMA: a standing-alone manager, what requests it, and what lets its sessions in again.

`guest_node.py prefill|decode`: `[command, arguments]` a line on stdin, `{"value"}` or `{"error"}` a line on stdout.
"""

from __future__ import annotations

import collections
import ctypes
import json
import logging
import mmap
import os
import sys
import threading
import time
import types
from typing import Any

MEMORY = 4 << 20
AUX_MEMORY = 4096
# A request that is refused costs nothing and is repeated soon, so that what is said of "served again after" has a grain
# of a tenth of a second.
REFUSED_AGAIN_S = 0.1
NATIVE_INTERVAL_S = 30.0


class GuestNode:
    """What the commands do. `role` is prefill or decode."""

    def __init__(self, role: str) -> None:
        self._lines: list[tuple[float, str, str]] = []
        self._keep_log()
        from sglang.srt.disaggregation.mooncake import conn

        self._conn = conn
        self._areas = [mmap.mmap(-1, MEMORY), mmap.mmap(-1, AUX_MEMORY)]
        self._blocks, self._aux = (ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in self._areas)
        memory = types.SimpleNamespace(
            kv_data_ptrs=[self._blocks],
            kv_data_lens=[MEMORY],
            aux_data_ptrs=[self._aux],
            aux_data_lens=[AUX_MEMORY],
        )
        self._manager: Any = conn.MooncakeKVManager(memory, role)
        self._there: dict[str, int] = {}
        self._outcomes: dict[str, list[tuple[float, float, str]]] = collections.defaultdict(list)
        self._stop = threading.Event()

    def ready(self) -> dict[str, Any]:
        return {"session": self._manager.get_session_id(), "blocks": self._blocks, "aux": self._aux}

    def register(self, session: str, blocks: int, aux: int) -> None:
        """A decode node tells this prefill node its memory."""
        self._there[session] = blocks
        self._manager.register_decode(session, self._conn.PeerMemory([blocks], [aux]))

    def send(self, session: str, size: int) -> str:
        """Sends one block; empty if it arrived, else why not."""
        try:
            self._manager.send_blocks(session, [(self._blocks, self._there[session], size)])
        except self._conn.KVTransferError as error:
            return str(error)
        return ""

    def request(self, sessions: list[str], size: int, every_s: float) -> None:
        """From now on a request of each session comes every so many seconds, one after another."""
        for session in sessions:
            threading.Thread(target=self._request, args=(session, size, every_s), daemon=True).start()

    def _request(self, session: str, size: int, every_s: float) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            why_not = self.send(session, size)
            ended = time.monotonic()
            refused = "is not alive" in why_not
            if not refused:
                self._outcomes[session].append((began, ended, why_not))
            self._stop.wait(REFUSED_AGAIN_S if refused else max(0.0, began + every_s - ended))

    def outcomes(self, session: str) -> list[tuple[float, float, str]]:
        """What became of the requests that were not refused: when each began and ended, and why it failed."""
        return self._outcomes[session]

    def let_in(self, way: str) -> None:
        """From now on sessions are let in ``native``: by one answered probe every 30 s, as SGLang does by itself; or
        at the ``limit``: by the first of reads, one after another, that is done.
        """
        target = {"native": self._let_in_natively, "limit": self._let_in_at_the_limit}[way]
        threading.Thread(target=target, daemon=True).start()

    def _let_in_natively(self) -> None:
        while not self._stop.wait(NATIVE_INTERVAL_S):
            for session in self.blacklisted():
                if self._manager.engine.send_probe(session) == 0:
                    self._un_blacklist(session)

    def _let_in_at_the_limit(self) -> None:
        while not self._stop.wait(0.01):
            for session in self.blacklisted():
                if self._read(session):
                    self._un_blacklist(session)

    def _read(self, session: str) -> bool:
        """One small read, for as long as that takes."""
        engine = self._manager.engine.engine
        batch = engine.batch_transfer_async_read(session, [self._aux], [self._there[session]], [8])
        while batch and (status := engine.transfer_check_status(batch)) == 0:
            time.sleep(0.01)
        return bool(batch) and status == 1

    def _un_blacklist(self, session: str) -> None:
        with self._manager.session_lock:
            self._manager.failed_sessions.discard(session)
        logging.info("Session %s recovered", session)

    def blacklisted(self) -> list[str]:
        with self._manager.session_lock:
            return sorted(self._manager.failed_sessions)

    def fill(self, byte: int, size: int) -> None:
        """Puts the byte all over the blocks."""
        ctypes.memset(self._blocks, byte, size)

    def bytes_at(self, places: list[int]) -> list[int]:
        """What is in the blocks."""
        return [self._areas[0][place] for place in places]

    def lines(self) -> list[tuple[float, str, str]]:
        """What was logged, with the clock's time."""
        return self._lines

    def _keep_log(self) -> None:
        keep = logging.Handler()
        keep.emit = lambda record: self._lines.append(  # type: ignore[method-assign]
            (time.monotonic(), record.levelname, record.getMessage())
        )
        as_mooncake = "%(levelname).1s%(asctime)s.%(msecs)03d %(message)s"
        handlers = [keep, logging.StreamHandler()]
        logging.basicConfig(level=logging.INFO, handlers=handlers, format=as_mooncake, datefmt="%m%d %H:%M:%S")


def serve(role: str) -> None:
    """The body of the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Mooncake prints
    node = GuestNode(role)
    print(json.dumps({"value": node.ready()}), file=answers, flush=True)
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = {"value": getattr(node, command)(*arguments)}
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
