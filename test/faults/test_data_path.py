"""Is a decode node that answers probes kept out for as long as transfers to it would fail?"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from network import Network, why_no_network
from node import Node

needs_network = pytest.mark.skipif(bool(why_no_network()), reason=f"no network fault is injected: {why_no_network()}")
INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
RecordFault = Callable[..., None]


@contextlib.contextmanager
def far_nodes(tmp_path: pathlib.Path, **environment: str) -> Iterator[tuple[Network, Node, Node, int]]:
    """Two nodes in a network of their own that have met, and the decode node's data port."""
    with (
        Network() as network,
        Node("prefill", tmp_path / "prefill", network.path, **environment) as prefill,
        Node("decode", tmp_path / "decode", network.path) as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        handshake = int(decode.session.rpartition(":")[2])
        (data,) = set(network.listening_ports(decode.process.pid)) - {handshake}
        yield network, prefill, decode, data


def send_for(prefill: Node, decode: Node, seconds: float) -> list[str]:
    """Sends again and again for so long; returns what went wrong, request by request."""
    until = time.monotonic() + seconds
    wrong = []
    while time.monotonic() < until:
        wrong.append(prefill.send_to(decode))
        time.sleep(0.02)
    return wrong


def served_after(prefill: Node, decode: Node, deadline_s: float) -> tuple[int, float]:
    """Sends until a transfer goes through; returns how many were lost on the way, and the seconds it took."""
    began = time.monotonic()
    lost = 0
    while (why := prefill.send_to(decode)) != "":
        lost += "Failed to send" in why
        assert time.monotonic() - began < deadline_s, f"not served after {deadline_s} s; log:\n{prefill.log_text()}"
        time.sleep(0.02)
    return lost, time.monotonic() - began


@needs_network
@pytest.mark.parametrize(("target", "shut_for_s"), [("REJECT", 5.0), ("DROP", 3.0)])
def test_no_request_is_lost_while_the_data_port_is_shut_and_requests_are_served_soon_after_it_opens(
    tmp_path: pathlib.Path, record_fault: RecordFault, target: str, shut_for_s: float
) -> None:
    with far_nodes(tmp_path) as (network, prefill, decode, data):
        with network.closed(data, target):
            assert "Failed to send" in prefill.send_to(decode)
            wrong = send_for(prefill, decode, shut_for_s)
            assert all("is not alive" in why for why in wrong), f"let in though its data port is shut: {set(wrong)}"
        lost, after_s = served_after(prefill, decode, deadline_s=12)
        record_fault("data port " + target.lower(), f"for {shut_for_s:g} s", lost=lost, served_after_s=after_s)
        assert lost == 0, "let in before its data port had opened"
        assert prefill.ask("recoveries") == 1
        assert "without proof" not in prefill.log_text()


@needs_network
@pytest.mark.parametrize("target", ["REJECT", "DROP"])
def test_a_peer_whose_data_port_stays_shut_is_let_in_only_after_interval_and_the_log_says_why(
    tmp_path: pathlib.Path, record_fault: RecordFault, target: str
) -> None:
    with far_nodes(tmp_path, **{INTERVAL: "5"}) as (network, prefill, decode, data):
        with network.closed(data, target):
            assert "Failed to send" in prefill.send_to(decode)
            failed_at = time.monotonic()
            refused_for_s = 0.0
            while "is not alive" in (why := prefill.send_to(decode)):
                assert time.monotonic() - failed_at < 5 + 10, f"never let in; log:\n{prefill.log_text()}"
                time.sleep(0.02)
                refused_for_s = time.monotonic() - failed_at
            assert "Failed to send" in why
            assert refused_for_s >= 4.9, f"let in unverified after {refused_for_s:.1f} s, before it answered for 5 s"
            prefill.wait_for_log("was let in on probation without proof that transfers work", deadline_s=2)
            prefill.wait_for_log("held for 1s", deadline_s=2)
            warnings = [line for line in prefill.log_text().splitlines() if "without proof" in line]
            assert len(warnings) == 1
            assert "WARNING" in warnings[0]
            assert decode.session in warnings[0]
            assert "reading its memory gave -1" in warnings[0], "the operator is not told what is wrong"
        lost, after_s = served_after(prefill, decode, deadline_s=40)
        record_fault(f"data port {target.lower()}", "longer than INTERVAL", lost=1 + lost, served_after_s=after_s)
        assert lost == 0


@needs_network
def test_a_peer_that_answers_and_cannot_transfer_costs_fewer_and_fewer_requests(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    """Interval 2 s: let in unverified after 2, 4, 8, ... s of answers."""
    with far_nodes(tmp_path, **{INTERVAL: "2"}) as (network, prefill, decode, data), network.closed(data, "REJECT"):
        assert "Failed to send" in prefill.send_to(decode)
        lost_at = [time.monotonic()]
        until = lost_at[0] + 18
        while time.monotonic() < until:
            if "Failed to send" in prefill.send_to(decode):
                lost_at.append(time.monotonic())
            time.sleep(0.02)
        gaps = [later - earlier for earlier, later in itertools.pairwise(lost_at)]
        record_fault("data port reject", "18 s, interval 2 s", lost=len(gaps), served_after_s=None)
        assert 1 <= len(gaps) <= 3, f"lost {len(gaps)} requests in 18 s"
        for gap, least in zip(gaps, (2, 4, 8), strict=False):
            assert gap >= 0.95 * least, f"let in again too soon; seconds between lost requests: {gaps}"


@needs_network
def test_a_decode_node_that_restarted_with_another_data_port_stays_out_until_it_registers(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    """Mooncake keeps the descriptor it has of a peer for good, so it cannot reach this one even then."""
    with restarted_with_another_data_port(tmp_path) as (prefill, decode):
        wrong = send_for(prefill, decode, 5)
        assert all("is not alive" in why for why in wrong), f"let in though it cannot be reached: {set(wrong)}"
        prefill.register(decode)
        assert prefill.ask("blacklisted") == [], "a registration takes a session off the blacklist"
        assert prefill.ask("recoveries") == 0
        record_fault("restart with another data port", "default", lost=0, served_after_s=None)


@needs_network
def test_a_decode_node_that_restarted_with_another_data_port_is_served_where_mooncake_keeps_no_descriptors(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    """The way out for operators. The first transfer may still meet a connection of the process that is gone."""
    with restarted_with_another_data_port(tmp_path, MC_DISABLE_METACACHE="1") as (prefill, decode):
        prefill.register(decode)
        lost, after_s = served_after(prefill, decode, deadline_s=5)
        record_fault("restart with another data port", "MC_DISABLE_METACACHE", lost=lost, served_after_s=after_s)
        assert lost <= 1
        assert set(send_for(prefill, decode, 1)) == {""}


@contextlib.contextmanager
def restarted_with_another_data_port(tmp_path: pathlib.Path, **environment: str) -> Iterator[tuple[Node, Node]]:
    """A prefill node that has blacklisted a decode node which was killed, and the new one on the same port."""
    with Network() as network, Node("prefill", tmp_path / "prefill", network.path, **environment) as prefill:
        keep_no_closed_connections(network)
        with Node("decode", tmp_path / "old", network.path, MC_MIN_RPC_PORT="15500", MC_MAX_RPC_PORT="15501") as old:
            prefill.register(old)
            assert prefill.send_to(old) == ""
        assert "Failed to send" in prefill.send_to(old)
        with restarted_elsewhere(old.session, tmp_path / "new", network) as new:
            yield prefill, new


def restarted_elsewhere(old_session: str, log: pathlib.Path, network: Network, deadline_s: float = 20) -> Node:
    """A new decode node with the handshake port of an old one and another data port.

    Mooncake takes the two ports of a range of two in an order of its own, so this tries until the order is right.
    """
    handshake = int(old_session.rpartition(":")[2])
    low = handshake - 1 if handshake == 15500 else handshake  # the old data port was on the other side
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):  # Mooncake did not start: no port left for the data
            node = Node("decode", log, network.path, MC_MIN_RPC_PORT=str(low), MC_MAX_RPC_PORT=str(low + 1))
            if node.session == old_session:
                return node
            node.__exit__()
    raise TimeoutError(f"no decode node came up at {old_session} again within {deadline_s} s")


def keep_no_closed_connections(network: Network) -> None:
    """Frees the ports of a process that has ended at once: the kernel keeps closed connections for a minute."""
    write = "echo 0 > /proc/sys/net/ipv4/tcp_max_tw_buckets"
    subprocess.run(["nsenter", f"--net={network.path}", "sh", "-c", write], check=True, timeout=10)


def test_where_reads_never_work_verification_is_switched_off_once_a_session_has_proved_healthy_twice(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    with (
        Node("prefill", tmp_path / "prefill", **{INTERVAL: "5"}) as prefill,
        Node("decode", tmp_path / "decode") as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        prefill.ask("set_rule", "PROBATION_S", 2.0)
        prefill.misbehave("transfer_sync_read", "gives", -1)

        prefill.blacklist(decode)
        first_s = prefill.wait_until_served(decode, deadline_s=5 + 4)
        assert first_s >= 4.9, "let in unverified before it had answered for INTERVAL"
        prefill.wait_for_log("without proof that transfers work: it answers probes, but reading its memory gave -1", 2)
        record_fault("reads always fail", "first outage", lost=0, served_after_s=first_s)

        assert set(send_for(prefill, decode, 6)) == {""}, "a healthy session lost a request on probation"
        prefill.wait_for_log("reads prove nothing on this transport", deadline_s=5)
        reads = prefill.calls("transfer_sync_read", decode.session)

        prefill.blacklist(decode)
        second_s = prefill.wait_until_served(decode, deadline_s=4)
        record_fault("reads always fail", "next outage", lost=0, served_after_s=second_s)
        assert prefill.calls("transfer_sync_read", decode.session) == reads, "reads though reads prove nothing"
        assert prefill.log_text().count("reads prove nothing on this transport") == 1
        assert prefill.log_text().count("without proof") == 1
        assert prefill.ask("recoveries") == 2
