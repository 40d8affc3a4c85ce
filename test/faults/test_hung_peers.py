"""Is a decode node that heals used again on time, however many others hang or are gone at the same moment?"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from kit.imposters import imposters
from kit.network import Network
from kit.node import Node
from kit.traffic import Requests

CLOSED_PORTS = range(21000, 22000)
WORKER = "MooncakeSessionWorker"
CONCURRENCY = 16
MOST_THREADS = 2 * CONCURRENCY
# It is asked within a second beside 300, and let in by its second answer, a second later; the rest is the machine's.
ASKED_WITHIN_S, SETTLE_S, MACHINE_S = 1.0, 1.0, 3.0


@pytest.mark.parametrize("place", ["first", "in the middle", "last"])
@pytest.mark.parametrize("count", [64, 300])
def test_a_decode_node_that_heals_is_used_again_on_time_beside_hung_ones(
    network: Network, pair: tuple[Node, Node], count: int, place: str, record_fault: Callable[..., None]
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    before = {"first": 0, "in the middle": count // 2, "last": count}[place]
    with imposters("silent", count, network=network.path) as hung:  # as a stopped peer: connected, and no answer
        prefill.ask("fail", [*hung[:before], decode.session, *hung[before:]])
        after_s = requests.until_served(deadline_s=20)
        record_fault(f"{count} peers hang", f"listeners; it failed {place}", lost=requests.lost, served_after_s=after_s)
        assert_on_time(prefill, requests, after_s)
        assert prefill.ask("blacklisted") == sorted(hung), "a peer that never answered was let in"


@pytest.mark.parametrize("fault", ["failed just now", "stood still"])
def test_a_decode_node_that_heals_is_used_again_on_time_though_all_places_are_taken(
    network: Network, pair: tuple[Node, Node], fault: str, record_fault: Callable[..., None]
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    with imposters("silent", 300, network=network.path) as hung:
        prefill.ask("fail", hung)
        wait_until_all_places_are_taken(prefill)
        if fault == "stood still":
            with decode.stopped():
                requests.first_fails()
        else:
            prefill.ask("fail", [decode.session])
        after_s = requests.until_served(deadline_s=20)
        record_fault("300 peers hang", f"all places taken; it {fault}", lost=requests.lost, served_after_s=after_s)
        assert_on_time(prefill, requests, after_s)


def assert_on_time(prefill: Node, requests: Requests, after_s: float | None) -> None:
    assert after_s is not None, prefill.log_text()
    assert requests.lost == 0
    promised_s = ASKED_WITHIN_S + SETTLE_S
    assert after_s < promised_s + MACHINE_S, f"a healthy decode node was refused for {after_s:.1f} s as others hang"


def wait_until_all_places_are_taken(prefill: Node) -> None:
    deadline = time.monotonic() + 30
    while prefill.ask("in_flight") < MOST_THREADS - CONCURRENCY:
        assert time.monotonic() < deadline, "probes of peers that hang do not take their places"
        time.sleep(0.02)


def test_peers_that_hang_take_no_more_threads_than_there_are_places_though_more_and_more_fail(
    network: Network, pair: tuple[Node, Node]
) -> None:
    prefill, _ = pair
    with imposters("silent", 300, network=network.path) as hung:
        threads = []
        for first in range(0, len(hung), 10):
            prefill.ask("fail", hung[first : first + 10])
            threads.append(prefill.ask("threads").count(WORKER))
            time.sleep(0.1)
        wait_until_all_places_are_taken(prefill)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            threads.append(prefill.ask("threads").count(WORKER))
            time.sleep(0.05)
        assert max(threads) <= MOST_THREADS, f"{max(threads)} threads hang: a pod has none left"
        assert max(threads) > CONCURRENCY, "no probe hangs, so this shows nothing"


def test_a_probe_that_hangs_is_ended_only_when_its_place_is_wanted(network: Network, pair: tuple[Node, Node]) -> None:
    """As long as it hangs, the peer is let in half a millisecond after it goes on."""
    prefill, decode = pair
    prefill.misbehave("send_probe", "works")
    with decode.stopped():
        prefill.ask("fail", [decode.session, *(f"127.0.0.1:{port}" for port in CLOSED_PORTS[:5])])
        time.sleep(3)
        assert prefill.calls("send_probe", decode.session) == (1, 0), "ended though there are places for the others"
        with imposters("silent", 100, network=network.path) as others:
            prefill.ask("fail", others)
            deadline = time.monotonic() + 10
            while prefill.calls("send_probe", decode.session)[1] == 0:
                assert time.monotonic() < deadline, "a probe keeps its place for a minute though others want it"
                time.sleep(0.02)


def test_peers_that_hung_are_found_again_however_many_go_on_hanging(
    network: Network, pair: tuple[Node, Node], record_fault: Callable[..., None]
) -> None:
    """Each of its addresses is a session of the one decode node, which stands still and goes on."""
    prefill, decode = pair
    port = decode.session.rpartition(":")[2]
    sessions = [f"127.0.0.{number}:{port}" for number in range(2, 42)]
    for session in sessions:
        prefill.ask("register", session, decode.address)
        assert prefill.ask("send", session, decode.address) == ""
    with imposters("silent", 100, network=network.path) as others:
        with decode.stopped():
            prefill.ask("fail", [*sessions, *others])
            time.sleep(5)
            assert prefill.ask("blacklisted") == sorted([*sessions, *others])
        began = time.monotonic()
        while not set(prefill.ask("blacklisted")).isdisjoint(sessions):
            assert time.monotonic() - began < 20, f"well again and still refused:\n{prefill.log_text()}"
            time.sleep(0.02)
        after_s = time.monotonic() - began
        record_fault("40 hang and go on", "100 others hang", lost=0, served_after_s=after_s)
        assert after_s < ASKED_WITHIN_S + SETTLE_S + MACHINE_S, f"refused for {after_s:.1f} s after they went on"
        assert prefill.ask("blacklisted") == sorted(others), "a peer that never answered was let in"


def test_a_decode_node_that_heals_is_used_again_on_time_beside_a_thousand_that_are_gone(
    pair: tuple[Node, Node], record_fault: Callable[..., None]
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    gone = [f"127.0.0.1:{port}" for port in CLOSED_PORTS]
    prefill.ask("fail", gone)
    with decode.stopped():
        requests.first_fails()
        prefill.ask("fail", gone)  # the requests to them fail again
    after_s = requests.until_served(deadline_s=15)
    record_fault("1,000 peers are gone", "closed ports; it stood still", lost=requests.lost, served_after_s=after_s)
    assert after_s is not None, f"a healthy decode node was refused because others are gone:\n{prefill.log_text()}"
    assert requests.lost == 0
    assert prefill.ask("blacklisted") == sorted(gone)
