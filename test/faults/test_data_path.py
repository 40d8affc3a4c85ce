"""Is a decode node that answers probes kept out for as long as transfers to it would fail?"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import re
import time
from collections.abc import Callable, Iterator

import pytest
from kit.network import Network, why_no_network
from kit.node import Node

needs_network = pytest.mark.skipif(bool(why_no_network()), reason=f"no network fault is injected: {why_no_network()}")
INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
RecordFault = Callable[..., None]
CPU_SHARE = 0.03  # 2 % are promised
MACHINE_S = 1.5  # what a machine with other things to do may add to a promise


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
        lost, after_s = served_after(prefill, decode, deadline_s=20)
        record_fault("data port " + target.lower(), f"for {shut_for_s:g} s", lost=lost, served_after_s=after_s)
        assert lost == 0, "let in before its data port had opened"
        prefill.wait_for_recoveries(1)
        assert "without proof" not in prefill.log_text()


@needs_network
@pytest.mark.parametrize(
    ("target", "why"),
    [("REJECT", "reading its memory gave -1"), ("DROP", "reads of its memory have not ended for")],
    ids=["REJECT", "DROP"],
)
def test_a_peer_whose_data_port_stays_shut_is_let_in_only_after_interval_and_the_log_says_why(
    tmp_path: pathlib.Path, record_fault: RecordFault, target: str, why: str
) -> None:
    with far_nodes(tmp_path, **{INTERVAL: "5"}) as (network, prefill, decode, data):
        with network.closed(data, target):
            assert "Failed to send" in prefill.send_to(decode)
            failed_at = time.monotonic()
            while "is not alive" in (wrong := prefill.send_to(decode)):
                assert time.monotonic() - failed_at < 5 + 20, f"never let in; log:\n{prefill.log_text()}"
                time.sleep(0.02)
            assert "Failed to send" in wrong
            prefill.wait_for_log("was let in on probation without proof that transfers work")
            prefill.wait_for_log("held for 1s")
            (out_for_s,) = map(float, re.findall(r"out for ([0-9.]+) s", prefill.log_text()))
            assert out_for_s >= 5, f"let in unverified after {out_for_s} s, before it answered for 5 s"
            warnings = [line for line in prefill.log_text().splitlines() if "without proof" in line]
            assert len(warnings) == 1
            assert "WARNING" in warnings[0]
            assert decode.session in warnings[0]
            assert why in warnings[0], "the operator is not told what is wrong"
        lost, after_s = served_after(prefill, decode, deadline_s=40)
        record_fault(f"data port {target.lower()}", "longer than INTERVAL", lost=1 + lost, served_after_s=after_s)
        assert lost == 0


@needs_network
def test_reads_that_wait_for_a_dropped_data_port_cost_no_cpu_and_count_when_it_heals(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    with far_nodes(tmp_path) as (network, prefill, decode, data):
        prefill.misbehave("batch_transfer_async_read", "works")  # counted from now on
        with network.dropped(data):
            assert "Failed to send" in prefill.send_to(decode)  # this costs seconds of CPU, of Mooncake alone
            began = time.monotonic()
            while prefill.calls("batch_transfer_async_read", decode.session) != (4, 4):
                assert time.monotonic() - began < 5, "its memory is not read though it answers"
                time.sleep(0.02)
            before_s, watched_s = prefill.ask("cpu_s"), 6.0
            time.sleep(watched_s)
            share = (prefill.ask("cpu_s") - before_s) / watched_s
            print(f"\n{share:.1%} of a core while reads are pending")
            assert share <= CPU_SHARE, f"{share:.1%} of a core for reads that wait for a dropped data port"
            assert prefill.ask("pending_reads") == 1
            broken_s = time.monotonic() - began
        healed_at = time.monotonic()
        while prefill.ask("pending_reads"):
            assert time.monotonic() - healed_at < broken_s + 5, "the data port is open and reads of it never end"
            time.sleep(0.01)
        assert prefill.calls("batch_transfer_async_read", decode.session) == (4, 4), "they were given up before"
        first_lane_s = time.monotonic() - healed_at
        lost, more_s = served_after(prefill, decode, deadline_s=20)
        record_fault("data port drop", f"for {broken_s:.0f} s", lost=lost, served_after_s=first_lane_s + more_s)
        print(f"reads ended {first_lane_s:.2f} s after the heal; served {more_s:.2f} s after that")
        assert lost == 0
        assert more_s <= 1.5 + MACHINE_S, f"served only {more_s:.1f} s after its memory could be read"


@needs_network
def test_a_peer_that_answers_and_cannot_transfer_costs_fewer_and_fewer_requests(
    tmp_path: pathlib.Path, record_fault: RecordFault
) -> None:
    """Interval 2 s: let in unverified after 2, 8, 32, ... s of answers."""
    with far_nodes(tmp_path, **{INTERVAL: "2"}) as (network, prefill, decode, data), network.closed(data, "REJECT"):
        lost = []  # from when until when each of them was on its way
        until = time.monotonic() + 18
        while (sent_at := time.monotonic()) < until:
            if "Failed to send" in prefill.send_to(decode):
                lost.append((sent_at, time.monotonic()))
            time.sleep(0.02)
        gaps = [later[1] - earlier[0] for earlier, later in itertools.pairwise(lost)]
        record_fault("data port reject", "18 s, interval 2 s", lost=len(gaps), served_after_s=None)
        assert 1 <= len(gaps) <= 2, f"lost {len(gaps)} requests in 18 s"
        for gap, least in zip(gaps, (2, 8), strict=False):
            assert gap >= least, f"let in again too soon; seconds between lost requests: {gaps}"


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
        lost, after_s = served_after(prefill, decode, deadline_s=10)
        record_fault("restart with another data port", "MC_DISABLE_METACACHE", lost=lost, served_after_s=after_s)
        assert lost <= 1
        assert set(send_for(prefill, decode, 1)) == {""}


@contextlib.contextmanager
def restarted_with_another_data_port(tmp_path: pathlib.Path, **environment: str) -> Iterator[tuple[Node, Node]]:
    """A prefill node that has blacklisted a decode node which was killed, and that one, back on its handshake port."""
    with (
        Network() as network,
        Node("prefill", tmp_path / "prefill", network.path, **environment) as prefill,
        Node("decode", tmp_path / "decode", network.path, ports=(20001, 20000)) as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        decode.kill()
        assert "Failed to send" in prefill.send_to(decode)
        decode.restart(data_port=20002)
        yield prefill, decode


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
        prefill.misbehave("transfer_check_status", "gives", -1)

        stopped_until = prefill.blacklist(decode)
        first_s = prefill.wait_until_served(decode, deadline_s=5 + 10)
        assert time.monotonic() - stopped_until >= 5, "let in unverified before it had answered for INTERVAL"
        prefill.wait_for_log("without proof that transfers work: it answers probes, but reading its memory gave -1")
        record_fault("reads always fail", "first outage", lost=0, served_after_s=first_s)

        assert set(send_for(prefill, decode, 3)) == {""}, "a healthy session lost a request on probation"
        assert "reads prove nothing" not in prefill.log_text(), "one probation may be a blip"
        assert set(send_for(prefill, decode, 3)) == {""}, "a healthy session lost a request on probation"
        prefill.wait_for_log("reads prove nothing on this transport")
        reads = prefill.calls("batch_transfer_async_read", decode.session)

        prefill.blacklist(decode)
        second_s = prefill.wait_until_served(decode, deadline_s=10)
        record_fault("reads always fail", "next outage", lost=0, served_after_s=second_s)
        assert prefill.calls("batch_transfer_async_read", decode.session) == reads, "reads though reads prove nothing"
        assert prefill.log_text().count("reads prove nothing on this transport") == 1
        assert prefill.log_text().count("without proof") == 1
        prefill.wait_for_recoveries(2)
