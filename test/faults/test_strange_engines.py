"""Does a Mooncake whose calls raise, hang or give nonsense do harm beyond the session concerned?

The strange calls stand in front of the real engine. A decode node listens on all loopback addresses, so 127.0.0.2,
127.0.0.3 and so on, with its port, are as many sessions of the one node, each of which can be strange in its own way.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.node import Node
from sglang.srt.observability import failed_session_log

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


# How Mooncake reads: the call, whether it lacks the asynchronous ones, and what is no right answer of it.
READS = {
    "begun": ("batch_transfer_async_read", False, [0, None, True, False, "7", 0.0, -0.0, 7.0, [7]]),
    "looked at": ("transfer_check_status", False, [-1, -2, 2, None, True, False, "1", 0.0, -0.0, 1.0, [1]]),
    "made at once": ("transfer_sync_read", True, [-1, 1, None, True, False, "0", 0.0, -0.0, [0]]),
}


def can_only_read_at_once(prefill: Node) -> None:
    for call in ("batch_transfer_async_read", "transfer_check_status"):
        prefill.misbehave(call, "lacks")


@pytest.mark.parametrize("read", READS)
def test_reads_that_raise_or_give_nonsense_let_in_after_interval_and_the_log_says_why(
    read: str, nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    call, at_once, wrong_answers = READS[read]
    if at_once:
        can_only_read_at_once(prefill)
    strange = strange_sessions(prefill, decode, call, [*RAISING, *(("gives", value) for value in wrong_answers)])
    failed_at = time.monotonic()
    prefill.ask("fail", [*strange, decode.session])
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("strange reads", f"{len(strange)} of them, {read}", lost=0, served_after_s=served_s)

    while prefill.ask("blacklisted") == sorted(strange):
        assert time.monotonic() - failed_at < INTERVAL_S + 15, "they answer and are never let in"
        time.sleep(0.02)
    assert time.monotonic() - failed_at >= INTERVAL_S, "let in though its memory could not be read"
    wait_until_blacklist_is(prefill, [], deadline_s=20)
    prefill.wait_for_recoveries(1 + len(strange))
    prefill.wait_for_log("was let in on probation", times=len(strange))
    for session, (how, value) in strange.items():
        (warning,) = let_in_without_proof(prefill, session)
        assert f"reading its memory {said_of(call, how, value)}" in warning
    assert let_in_without_proof(prefill, decode.session) == [], "strange reads held up others"
    assert "Traceback" not in prefill.log_text()


def let_in_without_proof(prefill: Node, session: str) -> list[str]:
    """What the log says when the session is let in unverified."""
    return [line for line in prefill.log_text().splitlines() if f"{session} was let in on probation" in line]


def said_of(call: str, how: str, value: Any) -> str:
    if how == "raises":
        return f"raised {value}"
    return "was refused" if call == "batch_transfer_async_read" and value == 0 else f"gave {value!r}"


# A call that does not return keeps its thread, and the kernel does not know for what it waits: it cannot be ended.
NEVER = {
    "return": ("batch_transfer_async_read", False, ("hangs", None)),
    "return at once": ("transfer_sync_read", True, ("hangs", None)),
    "end": ("transfer_check_status", False, ("gives", 0)),
}


@pytest.mark.parametrize("hanging", [1, 20])
@pytest.mark.parametrize("never", NEVER)
def test_reads_that_never_end_hold_up_nobody_and_their_sessions_are_let_in_after_interval(
    never: str, hanging: int, nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    call, at_once, fault = NEVER[never]
    if at_once:
        can_only_read_at_once(prefill)
    strange = strange_sessions(prefill, decode, call, [fault] * hanging)
    failed_at = time.monotonic()
    prefill.ask("fail", [*strange])
    for session in strange:
        wait_until_read(prefill, call, session)
    prefill.ask("fail", [decode.session])
    served_s = prefill.wait_until_served(decode, deadline_s=INTERVAL_S - 1)
    record_fault(f"reads that never {never}", f"{hanging} of them", lost=0, served_after_s=served_s)
    prefill.wait_for_log(f"Session {decode.session} recovered")
    assert let_in_without_proof(prefill, decode.session) == [], "reads of others held it up"

    wait_until_blacklist_is(prefill, [], deadline_s=20)
    assert time.monotonic() - failed_at >= INTERVAL_S, "let in though its memory could not be read"
    prefill.wait_for_recoveries(1 + hanging)
    prefill.wait_for_log("was let in on probation", times=hanging)
    for session in strange:
        (warning,) = let_in_without_proof(prefill, session)
        (hung_for_s,) = re.findall(r"but reads of its memory have not ended for (\d+) s", warning)
        assert 1 <= int(hung_for_s) <= 20
    assert "Traceback" not in prefill.log_text()


def wait_until_read(prefill: Node, call: str, session: str) -> None:
    deadline = time.monotonic() + 20
    while prefill.calls(call, session)[0] == 0:
        assert time.monotonic() < deadline, f"the memory of {session} is not read; log:\n{prefill.log_text()}"
        time.sleep(0.02)


def test_where_mooncake_cannot_read_the_handshake_decides(nodes: tuple[Node, Node], record_fault: RecordFault) -> None:
    prefill, decode = nodes
    can_only_read_at_once(prefill)
    prefill.misbehave("transfer_sync_read", "lacks")
    prefill.blacklist(decode)
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("strange engine", "cannot read", lost=0, served_after_s=served_s)
    prefill.wait_for_recoveries(1)
    assert "without proof" not in prefill.log_text()


def test_where_mooncake_can_only_read_at_once_a_session_is_verified_all_the_same(
    nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    can_only_read_at_once(prefill)
    prefill.blacklist(decode)
    served_s = prefill.wait_until_served(decode, deadline_s=10)
    record_fault("strange engine", "can only read at once", lost=0, served_after_s=served_s)
    prefill.wait_for_recoveries(1)
    assert prefill.calls("transfer_sync_read", decode.session) == (4, 4)
    assert "without proof" not in prefill.log_text()


def test_a_page_that_mooncake_does_not_take_is_said_once_and_counts_as_unverified(
    nodes: tuple[Node, Node], record_fault: RecordFault
) -> None:
    prefill, decode = nodes
    prefill.misbehave("register_memory", "gives", -1)
    for outage in (1, 2):
        prefill.blacklist(decode)
        served_s = prefill.wait_until_served(decode, deadline_s=10)
        record_fault("strange engine", "takes no page to read into", lost=0, served_after_s=served_s)
        prefill.wait_for_recoveries(outage)
        prefill.register(decode)  # the next failure is a first one again
    prefill.wait_for_log("was let in on probation", times=2)
    assert all("register a page to read into" in line for line in let_in_without_proof(prefill, decode.session))
    assert prefill.log_text().count("so no peer's memory can be read for now") == 1


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
    said = [prefill.log_text().count(f"Session id {session!r} is not host:port") for session in MALFORMED]
    named = failed_session_log.LINES_IN_A_SPELL
    assert said == [1] * named + [0] * (len(MALFORMED) - named), "said again, or not at all"
    assert PROBE_LOOP in prefill.ask("threads")
