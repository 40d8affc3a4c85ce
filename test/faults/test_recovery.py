"""Does the standing-alone manager heal a session over real Mooncake engines, fault by fault?"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import time
from collections.abc import Iterator

import pytest
from kit.network import Network, why_no_network
from kit.node import Node

needs_network = pytest.mark.skipif(bool(why_no_network()), reason=f"no network fault is injected: {why_no_network()}")


@pytest.fixture
def nodes(tmp_path: pathlib.Path) -> Iterator[tuple[Node, Node]]:
    with Node("prefill", tmp_path / "prefill") as prefill, Node("decode", tmp_path / "decode") as decode:
        prefill.register(decode)
        assert prefill.send_to(decode) == ""  # first contact with a stopped peer takes Mooncake a minute
        yield prefill, decode


@contextlib.contextmanager
def listeners_that_never_answer(count: int) -> Iterator[list[str]]:
    """Sessions whose handshake hangs, as a stopped process's does: the connection is made and nothing comes."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        yield [f"127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]


def test_a_stopped_decode_node_is_used_again_soon_after_it_goes_on(nodes: tuple[Node, Node]) -> None:
    prefill, decode = nodes
    assert prefill.ask("recoveries") == 0

    with decode.stopped():
        assert "Failed to send" in prefill.send_to(decode)
        assert "is not alive" in prefill.send_to(decode)
        assert prefill.ask("blacklisted") == [decode.session]
        stopped_until = time.monotonic()
    prefill.wait_until_served(decode, deadline_s=10)
    assert time.monotonic() - stopped_until >= 0.5, "let in before it had settled"

    prefill.wait_for_recoveries(1)
    assert prefill.ask("failures") == {}
    prefill.wait_for_log("recovered via probe")
    assert prefill.log_text().count(f"Session {decode.session} recovered via probe; un-blacklisted") == 1
    prefill.ask("fill", 7)
    assert prefill.send_to(decode) == ""
    assert decode.ask("first_and_last") == [7, 7]


def test_one_decode_node_heals_on_time_beside_64_that_hang(nodes: tuple[Node, Node]) -> None:
    prefill, decode = nodes
    with listeners_that_never_answer(64) as hung:
        prefill.ask("fail", hung)
        prefill.blacklist(decode)
        prefill.wait_until_served(decode, deadline_s=10)
        assert prefill.ask("blacklisted") == sorted(hung)


def test_a_killed_decode_node_stays_out_and_a_registration_lets_it_in(nodes: tuple[Node, Node]) -> None:
    prefill, decode = nodes
    decode.process.kill()
    decode.process.wait()
    assert "Failed to send" in prefill.send_to(decode)
    time.sleep(2.5)
    assert "is not alive" in prefill.send_to(decode), "a dead peer was let in"
    prefill.register(decode)
    assert prefill.ask("blacklisted") == []
    assert prefill.ask("recoveries") == 0


def test_without_the_feature_a_session_stays_dead(tmp_path: pathlib.Path) -> None:
    with (
        Node("prefill", tmp_path / "prefill", SGLANG_ENABLE_FAILED_SESSION_PROBE="0") as prefill,
        Node("decode", tmp_path / "decode") as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        prefill.blacklist(decode)
        time.sleep(3)
        assert "is not alive" in prefill.send_to(decode)
        assert prefill.ask("threads") == ["MainThread"]
        assert prefill.ask("recoveries") is None


def test_a_decode_manager_runs_no_probe(nodes: tuple[Node, Node]) -> None:
    _, decode = nodes
    assert decode.ask("threads") == ["MainThread"]
    assert decode.ask("recoveries") is None


def test_teardown_with_stuck_probes_is_quick_and_leaves_no_probe_loop(nodes: tuple[Node, Node]) -> None:
    prefill, _ = nodes
    with listeners_that_never_answer(16) as hung:
        prefill.ask("fail", hung)
        prefill.wait_for_log("Starting failed-session probe loop (interval=30.0s)")
        # Hung probes last a minute, and teardown() gives up on a loop that does not stop after 3 s.
        assert prefill.ask("teardown") < 2.5, "teardown() was held up"
        assert "MooncakeFailedSessionProbe" not in prefill.ask("threads")


def test_an_exit_with_probes_in_flight_is_clean_and_not_held_up(nodes: tuple[Node, Node]) -> None:
    prefill, decode = nodes
    with listeners_that_never_answer(8) as hung:
        prefill.ask("fail", [*hung, decode.session])
        assert prefill.process.stdin is not None
        began = time.monotonic()
        prefill.process.stdin.write('["exit", 0]\n')
        prefill.process.stdin.flush()
        assert prefill.process.wait(timeout=20) == 0, prefill.log.read_text()[-2000:]
        assert time.monotonic() - began < 15, "an exit waited for hung peers"  # a minute; test_exits.py has the bar


@pytest.fixture
def far_nodes(tmp_path: pathlib.Path) -> Iterator[tuple[Network, Node, Node, int, int]]:
    """Two nodes in a network of their own, and the decode node's handshake and data ports."""
    with (
        Network() as network,
        Node("prefill", tmp_path / "prefill", network.path, SGLANG_FAILED_SESSION_PROBE_INTERVAL_S="8") as prefill,
        Node("decode", tmp_path / "decode", network.path) as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        handshake = int(decode.session.rpartition(":")[2])
        (data,) = set(network.listening_ports(decode.process.pid)) - {handshake}
        yield network, prefill, decode, handshake, data


@needs_network
@pytest.mark.parametrize("target", ["REJECT", "DROP"])
def test_a_decode_node_behind_a_broken_network_is_used_again_when_it_heals(
    far_nodes: tuple[Network, Node, Node, int, int], target: str
) -> None:
    network, prefill, decode, handshake, data = far_nodes
    with network.closed(handshake, target), network.closed(data, target):
        assert "Failed to send" in prefill.send_to(decode)
        time.sleep(3)
        assert "is not alive" in prefill.send_to(decode)
    prefill.wait_until_served(decode, deadline_s=12)
    prefill.wait_for_recoveries(1)
    assert "without proof" not in prefill.log_text()


@needs_network
def test_no_request_is_lost_to_a_peer_that_answers_and_cannot_transfer(
    far_nodes: tuple[Network, Node, Node, int, int],
) -> None:
    network, prefill, decode, _, data = far_nodes
    with network.closed(data, "REJECT"):
        assert "Failed to send" in prefill.send_to(decode)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            assert "is not alive" in prefill.send_to(decode), "let in though its data port is shut"
            time.sleep(0.05)
    prefill.wait_until_served(decode, deadline_s=10)


@needs_network
def test_a_peer_that_cannot_be_verified_is_let_in_slowly_and_said_aloud(
    far_nodes: tuple[Network, Node, Node, int, int],
) -> None:
    network, prefill, decode, _, data = far_nodes
    with network.closed(data, "REJECT"):
        assert "Failed to send" in prefill.send_to(decode)
        prefill.wait_for_log("was let in on probation without proof", deadline_s=8 + 10)
        assert "reading its memory gave -1" in prefill.log_text()
        assert "Failed to send" in prefill.send_to(decode), "the data port is shut"
        prefill.wait_for_log("held for 1s")
