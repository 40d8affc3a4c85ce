"""Does a Mooncake whose calls raise, hang or give nonsense do harm beyond the session concerned?

The strange calls stand in front of the real engine. A decode node listens on all loopback addresses, so 127.0.0.2,
127.0.0.3 and so on, with its port, are as many sessions of the one node, each of which can be strange in its own way.
"""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from node import Node

INTERVAL_S = 5
RecordFault = Callable[..., None]
# What a call does instead of its work: how it misbehaves, and with what.
RAISING = [("raises", name) for name in ("RuntimeError", "KeyboardInterrupt", "SystemExit", "GeneratorExit", "Cut")]
WRONG_ANSWERS = [("gives", value) for value in (None, True, False, "0", 0.0, -0.0, 1, [0])]
PROBE_LOOP = "MooncakeFailedSessionProbe"


@pytest.fixture
def nodes(tmp_path: pathlib.Path) -> Iterator[tuple[Node, Node]]:
    with (
        Node("prefill", tmp_path / "prefill", SGLANG_FAILED_SESSION_PROBE_INTERVAL_S=str(INTERVAL_S)) as prefill,
        Node("decode", tmp_path / "decode") as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        yield prefill, decode


def strange_sessions(
    prefill: Node, decode: Node, call: str, faults: list[tuple[str, Any]]
) -> dict[str, tuple[str, Any]]:
    """As many further sessions of the decode node, registered and used once; then each call is strange in its way."""
    port = decode.session.rpartition(":")[2]
    sessions = {f"127.0.0.{number}:{port}": fault for number, fault in zip(itertools.count(2), faults, strict=False)}
    for session in sessions:
        prefill.ask("register", session, decode.address)
        assert prefill.ask("send", session, decode.address) == ""
    for session, (how, value) in sessions.items():
        prefill.misbehave(call, how, value, session)
    return sessions


def wait_until_blacklist_is(prefill: Node, sessions: Iterator[str] | list[str], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while prefill.ask("blacklisted") != sorted(sessions):
        assert time.monotonic() < deadline, f"blacklisted: {prefill.ask('blacklisted')}; log:\n{prefill.log_text()}"
        time.sleep(0.02)


def test_probes_that_raise_hang_or_give_nonsense_let_nobody_in_and_hold_up_nobody(
    nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    strange = strange_sessions(prefill, decode, "send_probe", [*RAISING, *WRONG_ANSWERS, ("hangs", None)])
    prefill.ask("fail", [*strange, decode.session])
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("strange probes", f"{len(strange)} of them", lost=0, served_after_s=served_s)

    time.sleep(INTERVAL_S + 0.5)
    assert prefill.ask("blacklisted") == sorted(strange), "let in on a wrong answer"
    prefill.wait_for_recoveries(1)
    assert PROBE_LOOP in prefill.ask("threads")
    for session, (how, value) in strange.items():
        asked, _ = prefill.calls("send_probe", session)
        assert asked > 1 or how == "hangs", f"{session} is asked no more"
        said = [line for line in prefill.log_text().splitlines() if f"Probing session {session} raised" in line]
        assert len(said) == (how == "raises"), f"probes of {session} raised; in the log: {said}"
        assert all(value in line for line in said)
    assert "Traceback" not in prefill.log_text()

    hung = [session for session, (how, _) in strange.items() if how == "hangs"]
    for session in strange:
        prefill.misbehave("send_probe", "works", None, session)
    wait_until_blacklist_is(prefill, hung, deadline_s=20)
    prefill.blacklist(decode)
    prefill.wait_until_served(decode, deadline_s=10)


def test_an_engine_that_is_strange_altogether_heals_its_sessions_as_soon_as_it_works(
    nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    for how, value in [("raises", "SystemExit"), ("raises", "Cut"), ("gives", False), ("gives", None), ("lacks", None)]:
        prefill.misbehave("send_probe", how, value)
        prefill.ask("fail", [decode.session])
        time.sleep(1.5)
        assert prefill.ask("blacklisted") == [decode.session], f"let in by a probe that {how} {value}"
        assert PROBE_LOOP in prefill.ask("threads")
        prefill.misbehave("send_probe", "works")
        served_s = prefill.wait_until_served(decode, deadline_s=10)
        record_fault("strange engine", f"send_probe {how} {value}", lost=0, served_after_s=served_s)
        prefill.register(decode)  # the next failure is a first one again
    assert prefill.log_text().count("Probing session") == 2, "said once for each outage"
    assert "Traceback" not in prefill.log_text()


def test_reads_that_raise_or_give_nonsense_let_in_after_interval_and_the_log_says_why(
    nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    strange = strange_sessions(prefill, decode, "transfer_sync_read", [*RAISING, ("gives", -1), *WRONG_ANSWERS])
    failed_at = time.monotonic()
    prefill.ask("fail", [*strange, decode.session])
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("strange reads", f"{len(strange)} of them", lost=0, served_after_s=served_s)

    while prefill.ask("blacklisted") == sorted(strange):
        assert time.monotonic() - failed_at < INTERVAL_S + 15, "they answer and are never let in"
        time.sleep(0.02)
    assert time.monotonic() - failed_at >= INTERVAL_S, "let in though its memory could not be read"
    wait_until_blacklist_is(prefill, [], deadline_s=20)
    prefill.wait_for_recoveries(1 + len(strange))
    prefill.wait_for_log("was let in on probation", times=len(strange))
    for session, (how, value) in strange.items():
        (warning,) = [line for line in prefill.log_text().splitlines() if f"{session} was let in on probation" in line]
        assert f"reading its memory {'raised ' + value if how == 'raises' else f'gave {value!r}'}" in warning
    assert f"{decode.session} was let in on probation" not in prefill.log_text(), "strange reads held up others"
    assert "Traceback" not in prefill.log_text()


@pytest.mark.parametrize("hanging", [1, 4])
def test_reads_that_never_return_hold_up_others_for_the_interval_at_most(
    hanging: int, nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    """A slow verification lets others go beside it, up to four; past that, INTERVAL decides."""
    prefill, decode = nodes
    strange = strange_sessions(prefill, decode, "transfer_sync_read", [("hangs", None)] * hanging)
    for session in strange:
        prefill.ask("fail", [session])
        wait_until_read(prefill, session)
    prefill.ask("fail", [decode.session])
    served_s = prefill.wait_until_served(decode, deadline_s=INTERVAL_S + 10)
    record_fault("reads that never return", f"{hanging} of them", lost=0, served_after_s=served_s)
    if hanging == 4:
        prefill.wait_for_log(f"{decode.session} was let in on probation without proof")
        assert "other verifications took all the time" in prefill.log_text()
    else:
        prefill.wait_for_log(f"Session {decode.session} recovered")
        assert "without proof" not in prefill.log_text()
    assert prefill.ask("blacklisted") == sorted(strange)


def wait_until_read(prefill: Node, session: str) -> None:
    deadline = time.monotonic() + 20
    while prefill.calls("transfer_sync_read", session)[0] == 0:
        assert time.monotonic() < deadline, f"the memory of {session} is not read; log:\n{prefill.log_text()}"
        time.sleep(0.02)


def test_where_mooncake_cannot_read_the_handshake_decides(nodes: tuple[Node, Node], record_fault: RecordFault) -> None:
    prefill, decode = nodes
    prefill.misbehave("transfer_sync_read", "lacks")
    prefill.blacklist(decode)
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("strange engine", "cannot read", lost=0, served_after_s=served_s)
    prefill.wait_for_recoveries(1)
    assert "without proof" not in prefill.log_text()


MALFORMED = [
    "",
    " ",
    "abc",
    "127.0.0.1",
    "127.0.0.1:",
    "127.0.0.1:0",
    "127.0.0.1:012001",
    "127.0.0.1: 12001",
    "127.0.0.1:+12001",
    "127.0.0.1:65536",
    "127.0.0.1:99999999999999999999",
    "127.0.0.1:-1",
    "127.0.0.1:port",
    "127.0.0.1:12001x",
    "127.0.0.1:12001\n",
    "127.0.0.1:12001:12001",
    "127.0.0.1:\u0661\u0662",
    ":12001",
    "::1:12001",
    "[::1]",
    "[::1]:0",
    "[::1:12001",
]


def test_what_is_no_session_id_is_never_handed_to_mooncake_and_said_once(
    nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    prefill.misbehave("send_probe", "works")
    prefill.ask("fail", [*MALFORMED, decode.session])
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("malformed session ids", f"{len(MALFORMED)} of them", lost=0, served_after_s=served_s)
    prefill.ask("fail", MALFORMED)
    prefill.ask("fail", [decode.session])
    prefill.wait_until_served(decode, deadline_s=10)

    assert set(prefill.ask("calls", "send_probe")) == {decode.session}
    assert prefill.ask("blacklisted") == sorted(MALFORMED)
    for session in MALFORMED:
        assert prefill.log_text().count(f"Session id {session!r} is not host:port") == 1
    assert PROBE_LOOP in prefill.ask("threads")
