"""Is a decode node that heals used again on time, however many others hang or are gone at the same moment?"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from imposters import imposters
from network import Network
from node import Node
from traffic import Requests

CLOSED_PORTS = range(21000, 22000)
WORKER = "MooncakeSessionWorker"
AS_FEW_AS_ANY_POD = 64  # the least that may hang; of these, places for peers that failed just now or were prompt
PLACES_KEPT = 32
CONCURRENCY = 16


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
        assert after_s is not None, prefill.log_text()
        assert requests.lost == 0
        assert after_s < 15, f"a healthy decode node was refused for {after_s:.1f} s because others hang"
        assert prefill.ask("blacklisted") == sorted(hung), "a peer that never answered was let in"


@pytest.mark.parametrize("fault", ["failed just now", "stood still"])
def test_a_decode_node_that_heals_is_used_again_on_time_though_no_more_probes_may_hang(
    network: Network, pair: tuple[Node, Node], fault: str, record_fault: Callable[..., None]
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    prefill.ask("let_hang", AS_FEW_AS_ANY_POD)
    with imposters("silent", 300, network=network.path) as hung:
        prefill.ask("fail", hung)
        wait_until_as_many_hang(prefill, AS_FEW_AS_ANY_POD - PLACES_KEPT)
        if fault == "stood still":
            with decode.stopped():
                requests.first_fails()
        else:
            prefill.ask("fail", [decode.session])
        after_s = requests.until_served(deadline_s=20)
        record_fault("300 peers hang", f"no more may hang; it {fault}", lost=requests.lost, served_after_s=after_s)
        assert after_s is not None, prefill.log_text()
        assert requests.lost == 0
        assert after_s < 15, f"a healthy decode node was refused for {after_s:.1f} s because others hang"


def test_no_more_threads_hang_than_a_pod_may_have_though_peers_go_on_to_fail(
    network: Network, pair: tuple[Node, Node]
) -> None:
    prefill, _ = pair
    prefill.ask("let_hang", AS_FEW_AS_ANY_POD)
    with imposters("silent", 300, network=network.path) as hung:
        for first in range(0, len(hung), 10):
            prefill.ask("fail", hung[first : first + 10])
            time.sleep(0.1)
        wait_until_as_many_hang(prefill, AS_FEW_AS_ANY_POD - PLACES_KEPT)
        hanging = prefill.ask("threads").count(WORKER)
        assert hanging <= AS_FEW_AS_ANY_POD + CONCURRENCY, f"{hanging} threads hang: the pod has none left"


def wait_until_as_many_hang(prefill: Node, probes: int) -> None:
    deadline = time.monotonic() + 30
    while prefill.ask("threads").count(WORKER) < probes:
        assert time.monotonic() < deadline, f"fewer than {probes} probes hang"
        time.sleep(0.05)


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
