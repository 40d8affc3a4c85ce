"""What do tests do to a manager whose engine is a Python object?"""

from __future__ import annotations

import contextlib
import socket
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.disaggregation.mooncake.conn import PeerMemory
from sglang_failed_session_probe import SWITCH

ENABLE = SWITCH
INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
D = "decode:7001"
OTHER = "other:7002"
NO_MEMORY = types.SimpleNamespace(kv_data_ptrs=[], kv_data_lens=[], aux_data_ptrs=[], aux_data_lens=[])
SOME_MEMORY = PeerMemory(dst_kv_ptrs=[4096], dst_aux_ptrs=[8192])


MakeManager = Callable[..., Any]


def many(number: int) -> list[str]:
    return [f"decode:{port}" for port in range(1, number + 1)]


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


@contextlib.contextmanager
def stopped_peers(number: int) -> Iterator[list[str]]:
    """The sessions of processes that are stopped: connections to them are taken, and nobody says anything."""
    with contextlib.ExitStack() as listeners:
        ports = [
            listeners.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)).getsockname()[1]
            for _ in range(number)
        ]
        yield [f"127.0.0.1:{port}" for port in ports]


@contextlib.contextmanager
def full_peer() -> Iterator[tuple[str, int]]:
    """The address of a peer that takes no more connections: who connects waits, as where packets are dropped."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            connection = sockets.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        yield listener.getsockname()


def blacklist(manager: Any, *sessions: str) -> None:
    """A transfer to each of the sessions fails."""
    with manager.session_lock:
        for session in sessions:
            manager.session_failures[session] += 1
            manager.failed_sessions.add(session)


def blacklisted(manager: Any) -> set[str]:
    with manager.session_lock:
        return set(manager.failed_sessions)


def watch_of(manager: Any) -> Any:
    """Who watches over the manager's sessions."""
    return manager._failed_session_prober.watch


def send(manager: Any, session: str) -> None:
    manager.send_blocks(session, [(1, 2, 3)])
