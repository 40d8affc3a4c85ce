"""Does a registration take a session off the blacklist at once, and do questions asked before it count for nothing?"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

import pytest
from kit.network import Network, why_no_network
from kit.node import Node
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake.session_probe import NO_ANSWER as REFUSED

SETTLE = "SGLANG_FAILED_SESSION_PROBE_SETTLE_S"
VERIFY = "SGLANG_FAILED_SESSION_PROBE_VERIFY"
RecordFault = Callable[..., None]


@contextlib.contextmanager
def pair(tmp_path: pathlib.Path, network: str | None = None, **environment: str) -> Iterator[tuple[Node, Node]]:
    """Two nodes that have met. Calls of the prefill node's Mooncake are counted from the start."""
    with (
        Node("prefill", tmp_path / "prefill", network, **environment) as prefill,
        Node("decode", tmp_path / "decode", network) as decode,
    ):
        prefill.misbehave("send_probe", "works")
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        yield prefill, decode


def register_and_fail_again(prefill: Node, decode: Node) -> None:
    """The decode node registers, and the next transfer to it fails at once: a failure that no old answer concerns."""
    prefill.register(decode)
    assert prefill.ask("blacklisted") == [], "a registration takes a session off the blacklist at once"
    prefill.ask("fail", [decode.session])
    assert prefill.ask("recoveries") == 0, "a registration is no recovery"


def assert_stays_out(prefill: Node, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert prefill.ask("blacklisted"), "let in on an answer older than the newest failure"
        time.sleep(0.02)
    assert prefill.ask("recoveries") == 0


def test_a_probe_that_hung_during_a_registration_does_not_answer_for_a_later_failure(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    """One answer would be enough here, so an old one that counted would let the session in."""
    with pair(tmp_path, **{SETTLE: "0", VERIFY: "off"}) as (prefill, decode):
        with decode.stopped():
            assert "Failed to send" in prefill.send_to(decode)
            assert wait_until(lambda: prefill.calls("send_probe", decode.session) == (1, 0), 10), "no probe hangs"
            register_and_fail_again(prefill, decode)
            assert prefill.calls("send_probe", decode.session) == (1, 0), "two probes of one peer at a time"
            prefill.misbehave("send_probe", "gives", REFUSED)  # the one that hangs is Mooncake's still
        assert wait_until(lambda: prefill.calls("send_probe", decode.session)[1] >= 2, 10), "no new answer"
        assert_stays_out(prefill, 1.5)
        prefill.misbehave("send_probe", "works")
        served_s = prefill.wait_until_served(decode, deadline_s=10)
        prefill.wait_for_recoveries(1)
        record_fault("registration", "during a probe that hangs", lost=0, served_after_s=served_s)


def test_a_registration_while_a_session_settles_is_no_recovery_and_a_later_failure_settles_anew(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    with pair(tmp_path, **{SETTLE: "4"}) as (prefill, decode):
        prefill.ask("fail", [decode.session])
        assert wait_until(lambda: prefill.calls("send_probe", decode.session)[1] == 1, 10), "no first answer"
        prefill.register(decode)
        assert prefill.ask("blacklisted") == []
        time.sleep(4.5)
        assert prefill.ask("recoveries") == 0, "a registration was counted as a recovery"
        assert prefill.calls("send_probe", decode.session) == (1, 1), "still asked after it had registered"
        assert prefill.send_to(decode) == ""

        prefill.ask("fail", [decode.session])
        assert wait_until(lambda: prefill.calls("send_probe", decode.session)[1] == 2, 10), "no first answer"
        time.sleep(1.5)
        answered_until = time.monotonic()
        register_and_fail_again(prefill, decode)
        served_s = prefill.wait_until_served(decode, deadline_s=4 + 10)
        settled_s = time.monotonic() - answered_until
        assert settled_s >= 4, f"let in after {settled_s:.1f} s: it had not settled since the newest failure"
        assert "held for" not in prefill.log_text()
        record_fault("registration", "while it settles", lost=0, served_after_s=served_s)


@pytest.mark.skipif(bool(why_no_network()), reason=f"no network fault is injected: {why_no_network()}")
def test_reads_that_were_pending_during_a_registration_do_not_answer_for_a_later_failure(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    patient = {SETTLE: "0.1", "MC_TRANSFER_TIMEOUT": "30"}
    with Network() as network, pair(tmp_path, network.path, **patient) as (prefill, decode):
        (data,) = set(network.listening_ports(decode.process.pid)) - {int(decode.session.rpartition(":")[2])}
        with network.closed(data, "DROP"):
            prefill.ask("fail", [decode.session])
            assert wait_until(lambda: prefill.ask("pending_reads") == 1, 10), "no reads are pending"
            prefill.misbehave("send_probe", "gives", REFUSED)
            register_and_fail_again(prefill, decode)
        assert wait_until(lambda: prefill.ask("pending_reads") == 0, 25), "the reads do not end"
        assert prefill.calls("batch_transfer_async_read", decode.session) == (4, 4), "other reads were begun"
        assert_stays_out(prefill, 1.5)
        prefill.misbehave("send_probe", "works")
        served_s = prefill.wait_until_served(decode, deadline_s=10)
        prefill.wait_for_recoveries(1)
        record_fault("registration", "while reads are pending", lost=0, served_after_s=served_s)


def test_a_registration_on_probation_makes_the_next_failure_a_first_one(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    with pair(tmp_path, SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S="300") as (prefill, decode):
        prefill.ask("fail", [decode.session])
        prefill.wait_until_served(decode, deadline_s=10)
        prefill.ask("fail", [decode.session])
        prefill.wait_for_log("held for 1s")
        prefill.wait_until_served(decode, deadline_s=10)
        prefill.wait_for_recoveries(2)

        prefill.register(decode)
        assert prefill.ask("recoveries") == 2, "a registration is no recovery"
        prefill.ask("fail", [decode.session])
        served_s = prefill.wait_until_served(decode, deadline_s=10)
        prefill.wait_for_recoveries(3)
        assert prefill.log_text().count("held for") == 1, "held for relapses from before the registration"
        record_fault("registration", "on probation", lost=0, served_after_s=served_s)


def test_a_registration_right_after_every_connection_has_failed_costs_no_request(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    """Once each of its connections to a peer has failed in turn, Mooncake fails the next transfer unsent."""
    memory_that_is_gone = 4096
    with pair(tmp_path) as (prefill, decode):
        prefill.misbehave("batch_transfer_async_read", "is slow", 0.005)  # so that one has failed when the next begins
        served_s = []
        for time_read_in_vain in range(1, 4):
            prefill.ask("register", decode.session, memory_that_is_gone)
            prefill.ask("fail", [decode.session])
            prefill.wait_for_log("reading its memory gave -1", times=time_read_in_vain)
            assert wait_until(lambda: prefill.ask("in_flight") == 0, 5), "reads are still being begun"
            registered_at = time.monotonic()
            prefill.register(decode)
            assert prefill.send_to(decode) == "", "a request failed; without the probe it would not have"
            served_s.append(time.monotonic() - registered_at)
    record_fault("registration", "right after reads have failed", lost=0, served_after_s=max(served_s))
