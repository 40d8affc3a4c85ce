"""Which is the smallest manager that sends blocks over a Mooncake engine, blacklists sessions and heals them?

``conn`` gives it the probe. For tests, the bench and servers other than SGLang; it needs no SGLang.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import defaultdict
from typing import Any

from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import MooncakeTransferEngine


class KVTransferError(Exception):
    """Blocks could not be sent; the message says why."""


@dataclasses.dataclass(frozen=True)
class PeerMemory:
    """What a decode process registers with a prefill process: the addresses of its memory."""

    dst_kv_ptrs: list[int]
    dst_aux_ptrs: list[int] = dataclasses.field(default_factory=list)


class MooncakeKVManager:
    """Sends blocks of memory over a Mooncake engine, blacklists sessions and lets them in again.

    ``SGLANG_HOST_IP`` (127.0.0.1) and ``MOONCAKE_PROTOCOL`` (rdma) choose the address and the transport.
    """

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any = None, is_mla_backend: bool = False
    ) -> None:
        """Registers ``args.kv_data_ptrs`` and ``aux_data_ptrs`` (``kv_data_lens``, ``aux_data_lens`` bytes).

        ``disaggregation_mode`` is "prefill" or "decode". Raises ValueError for a wrong setting and RuntimeError
        if Mooncake does not start or refuses the memory.
        """
        self.kv_args = args
        self.disaggregation_mode = disaggregation_mode
        self._worker_threads: list[threading.Thread] = []
        self.decode_kv_args_table: dict[str, PeerMemory] = {}
        self.init_engine()
        self.register_buffer_to_engine()
        if getattr(disaggregation_mode, "value", disaggregation_mode) == "prefill":
            self.session_failures: dict[str, int] = defaultdict(int)
            self.failed_sessions: set[str] = set()
            self.session_lock = threading.Lock()
            self._in_order: dict[str, threading.Lock] = {}

    def init_engine(self) -> None:
        self.engine = MooncakeTransferEngine(os.environ.get("SGLANG_HOST_IP", "127.0.0.1"))

    def register_buffer_to_engine(self) -> None:
        """Registers the memory with the engine; raises RuntimeError if Mooncake refuses."""
        rc = self.engine.batch_register(*self._regions())
        if rc != 0:
            raise RuntimeError(f"Mooncake did not register the memory (rc {rc}).")

    def _regions(self) -> tuple[list[int], list[int]]:
        args = self.kv_args
        return [*args.kv_data_ptrs, *args.aux_data_ptrs], [*args.kv_data_lens, *args.aux_data_lens]

    def get_session_id(self) -> str:
        return self.engine.get_session_id()

    def register_decode(self, session_id: str, memory: PeerMemory) -> None:
        """Registers a decode process's memory, maybe again, and takes the process off the blacklist. Any thread."""
        with self.session_lock:
            self.failed_sessions.discard(session_id)
            self.session_failures.pop(session_id, None)
            self.decode_kv_args_table[session_id] = memory

    def send_blocks(self, session_id: str, blocks: list[tuple[int, int, int]]) -> None:
        """Writes blocks (address here, address there, bytes) to a decode process and waits until they are there.

        Raises KVTransferError if the session is blacklisted, and if the transfer fails, which blacklists it. Any
        thread. The requests for one session are sent one after another, as in SGLang: those behind one that fails are
        refused at once, and when a second one looks at the blacklist, the first has gone through.
        """
        with self._in_order.setdefault(session_id, threading.Lock()):
            with self.session_lock:
                if session_id in self.failed_sessions:
                    raise KVTransferError(
                        f"Decode instance could be dead, remote mooncake session {session_id} is not alive"
                    )
            sources, destinations, lengths = (list(column) for column in zip(*blocks, strict=True))
            rc = self.engine.batch_transfer_sync(session_id, sources, destinations, lengths)
            if rc != 0:
                with self.session_lock:
                    self.session_failures[session_id] += 1
                    self.failed_sessions.add(session_id)
                raise KVTransferError(f"Failed to send {len(blocks)} blocks to {session_id} (rc {rc})")

    def teardown(self) -> None:
        """Stops the threads and deregisters the memory."""
        if hasattr(self, "_failed_session_probe_shutdown"):
            self._failed_session_probe_shutdown.set()
        for thread in self._worker_threads:
            thread.join(timeout=3.0)
        self.engine.batch_deregister(self._regions()[0])
