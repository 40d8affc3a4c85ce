"""Does the smallest manager send, refuse, register and stop as SGLang's does? On an engine that is a Python object."""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kit.fake_engine import Engine
from kit.managers import ENABLE, NO_MEMORY, OTHER, SOME_MEMORY, D, send
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake.conn import KVTransferError, MooncakeKVManager

MEMORY = types.SimpleNamespace(
    kv_data_ptrs=[4096, 8192], kv_data_lens=[10, 20], aux_data_ptrs=[12288], aux_data_lens=[30]
)


class NotingEngine(Engine):
    """Notes what it is told to register and to send."""

    def __init__(self, registers_batch: int = 0, transfer: Any = 0) -> None:
        super().__init__(transfer=transfer)
        self.told: list[tuple[Any, ...]] = []
        self._registers_batch = registers_batch

    def batch_register(self, addresses: list[int], lengths: list[int]) -> int:
        self.told.append(("register", addresses, lengths))
        return self._registers_batch

    def batch_deregister(self, addresses: list[int]) -> int:
        self.told.append(("deregister", addresses))
        return 0

    def batch_transfer_sync(self, *transfer: Any) -> Any:
        self.told.append(("send", *transfer))
        return super().batch_transfer_sync(*transfer)

    def get_session_id(self) -> str:
        return "127.0.0.1:7000"


def manager_with(engine: Engine, monkeypatch: pytest.MonkeyPatch, args: Any = NO_MEMORY, role: str = "prefill") -> Any:
    """A manager without the probe."""
    monkeypatch.delenv(ENABLE, raising=False)
    monkeypatch.setattr(MooncakeKVManager, "init_engine", lambda self: setattr(self, "engine", engine))
    return MooncakeKVManager(args, role)


def test_its_memory_is_registered_when_it_is_made_and_no_more_after_the_teardown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = NotingEngine()
    manager = manager_with(engine, monkeypatch, MEMORY, role="decode")
    assert engine.told == [("register", [4096, 8192, 12288], [10, 20, 30])]
    assert manager.get_session_id() == "127.0.0.1:7000"
    manager.teardown()
    assert engine.told[1:] == [("deregister", [4096, 8192, 12288])]


def test_it_does_not_start_on_an_engine_that_does_not_take_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"Mooncake did not register the memory \(rc -1\)"):
        manager_with(NotingEngine(registers_batch=-1), monkeypatch)


def test_blocks_are_sent_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NotingEngine()
    manager_with(engine, monkeypatch).send_blocks(D, [(1, 10, 100), (2, 20, 200)])
    assert engine.told[1:] == [("send", D, [1, 2], [10, 20], [100, 200])]


def test_a_session_to_which_a_transfer_has_failed_is_refused_until_it_registers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = NotingEngine(transfer=-1)
    manager = manager_with(engine, monkeypatch)
    with pytest.raises(KVTransferError, match="Failed to send 1 blocks"):
        send(manager, D)
    engine.transfer = 0
    sent = len(engine.told)
    with pytest.raises(KVTransferError, match=f"remote mooncake session {D} is not alive"):
        send(manager, D)
    assert len(engine.told) == sent, "a request waits for a peer that is dead"
    send(manager, OTHER)
    assert dict(manager.session_failures) == {D: 1}
    manager.register_decode(D, SOME_MEMORY)
    assert manager.decode_kv_args_table == {D: SOME_MEMORY}
    assert dict(manager.session_failures) == {}
    send(manager, D)


def test_a_request_behind_one_that_fails_is_refused_and_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on SGLang. Were both under way together, the second would look as if the first had gone through."""
    engine = NotingEngine()
    engine.transfer = lambda: -1 if engine.goes_on.wait(30) else 0
    manager = manager_with(engine, monkeypatch)
    with ThreadPoolExecutor(3) as threads:
        requests = [threads.submit(send, manager, D) for _ in range(2)]
        assert wait_until(lambda: len(engine.told) > 1)
        requests.append(threads.submit(send, manager, OTHER))
        assert wait_until(lambda: len(engine.told) > 2), "a session waits for another one"
        engine.goes_on.set()
    reasons = sorted(str(request.exception()) for request in requests)
    assert [reason.split(",")[0] for reason in reasons] == [
        "Decode instance could be dead",
        f"Failed to send 1 blocks to {D} (rc -1)",
        f"Failed to send 1 blocks to {OTHER} (rc -1)",
    ]
