"""Is a decode node used again, first time right, when its outage is over, whatever kind of outage it was?"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from kit.network import Network
from kit.node import Node
from kit.traffic import Requests

Record = Callable[..., None]
Break = Callable[[Network, Node], AbstractContextManager[None]]


def check(requests: Requests, after_s: float | None, prefill: Node) -> None:
    """Fails if a request was lost or none was served."""
    assert after_s is not None, f"refused for good, though the decode node is well:\n{prefill.log_text()}"
    assert requests.lost == 0, f"{requests.lost} requests were lost to a session that was let in too soon"


@pytest.mark.parametrize(
    ("seconds", "deadline_s"),
    [(1, 10), (10, 10), pytest.param(70, 15, marks=pytest.mark.slow)],  # 70: longer than a probe hangs
)
def test_a_decode_node_that_stood_still_is_used_again(
    pair: tuple[Node, Node], seconds: float, deadline_s: float, record_fault: Record
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    with decode.stopped():
        goes_on_at = time.monotonic() + seconds
        if seconds < 6:
            requests.first_is_said_to_fail()  # a transfer waits for 5 s
        else:
            requests.first_fails()
        requests.keep_coming(goes_on_at - time.monotonic())
    after_s = requests.until_served(deadline_s)
    record_fault(f"decode node stands still for {seconds} s", "SIGSTOP", lost=requests.lost, served_after_s=after_s)
    check(requests, after_s, prefill)


def ports(decode: Node) -> tuple[int, int]:
    return decode.handshake_port, decode.data_port


# Name, how, the fault, whether transfers fail of it, and by when a request is to be served after it. TCP sends what was
# dropped again at growing intervals, so up to as long after the heal as the fault lasted.
NETWORK_FAULTS: list[tuple[str, str, Break, bool, float]] = [
    ("all packets dropped", "iptables DROP", lambda n, d: n.dropped(*ports(d)), True, 12),
    ("all answers dropped", "iptables DROP, way back", lambda n, d: n.dropped(*ports(d), direction="back"), True, 12),
    ("all packets rejected", "iptables REJECT", lambda n, d: n.rejected(*ports(d)), True, 10),
    ("connected, then silence", "iptables DROP after SYN", lambda n, d: n.cut(*ports(d)), True, 15),
    ("connected, then reset", "iptables REJECT after SYN", lambda n, d: n.reset(*ports(d)), True, 10),
    ("handshake port dropped", "iptables DROP", lambda n, d: n.dropped(d.handshake_port), False, 12),
    ("handshake port rejected", "iptables REJECT", lambda n, d: n.rejected(d.handshake_port), False, 10),
    ("data port dropped", "iptables DROP", lambda n, d: n.dropped(d.data_port), True, 20),
    ("data port rejected", "iptables REJECT", lambda n, d: n.rejected(d.data_port), True, 15),
]


@pytest.mark.parametrize(
    ("fault", "how", "broken", "transfers_fail", "deadline_s"),
    [pytest.param(*row, id=row[0]) for row in NETWORK_FAULTS],
)
def test_a_decode_node_behind_a_broken_network_is_used_again_when_it_heals(
    network: Network,
    pair: tuple[Node, Node],
    fault: str,
    how: str,
    broken: Break,
    transfers_fail: bool,
    deadline_s: float,
    record_fault: Record,
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    with broken(network, decode):
        if transfers_fail:
            requests.first_fails()
        else:
            requests.first_is_said_to_fail()
        assert requests.keep_coming(7) == 0, "served though the network is broken"
    after_s = requests.until_served(deadline_s)
    record_fault(fault, how, lost=requests.lost, served_after_s=after_s)
    check(requests, after_s, prefill)


def test_where_packets_are_dropped_probes_connect_anew_and_do_not_wait_for_the_kernel_to_try_again(
    network: Network, pair: tuple[Node, Node], record_fault: Record
) -> None:
    network.connects_like_linux_before_6_5()
    prefill, decode = pair
    requests = Requests(prefill, decode)
    with network.dropped(decode.handshake_port):
        prefill.misbehave("send_probe", "works")  # counted from now on
        requests.first_is_said_to_fail()
        requests.keep_coming(8)
        begun, _ = prefill.calls("send_probe", decode.session)
    assert begun >= 8, f"only {begun} probes in 8 s: each waited for the kernel, which tries again after 1 and 3 s"
    after_s = requests.until_served(deadline_s=10)
    fault = "handshake port dropped, Linux before 6.5"
    record_fault(fault, "iptables DROP", lost=requests.lost, served_after_s=after_s)
    check(requests, after_s, prefill)


def test_a_decode_node_whose_answers_come_late_is_used_again(
    network: Network, pair: tuple[Node, Node], record_fault: Record
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    with network.delayed(decode.handshake_port, seconds=2.5):  # long after a probe counts as one that hangs
        requests.first_is_said_to_fail()
        after_s = requests.until_served(deadline_s=20)  # it answers three times: at first, settled, verified
        record_fault("answers come 2.5 s late", "relay", lost=requests.lost, served_after_s=after_s)
        check(requests, after_s, prefill)


def test_a_decode_node_that_restarts_and_registers_is_served_first_time_right(
    pair: tuple[Node, Node], record_fault: Record
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    decode.kill()
    requests.first_fails()
    requests.keep_coming(2)
    decode.restart()
    assert requests.keep_coming(1.5) == 0, "let in before it registered, and its memory is somewhere else now"
    prefill.register(decode)
    after_s = requests.until_served(deadline_s=10)
    record_fault("restarts and registers", "SIGKILL, same ports", lost=requests.lost, served_after_s=after_s)
    check(requests, after_s, prefill)


# Until then what was its memory has been read in vain, the longer it takes the more often. Each time Mooncake leaves a
# lane to the peer alone for a second, whatever is to be sent meanwhile.
@pytest.mark.parametrize("registers_after_s", [1.7, 2.8, 3.9, 5.0, 6.1])
def test_a_registration_after_reads_in_vain_costs_no_request(
    pair: tuple[Node, Node], registers_after_s: float, record_fault: Record
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    decode.kill()
    requests.first_fails()
    decode.restart()
    assert requests.keep_coming(registers_after_s) == 0
    prefill.register(decode)
    after_s = requests.until_served(deadline_s=10)
    record_fault("restarts, registers later", "SIGKILL, same ports", lost=requests.lost, served_after_s=after_s)
    assert after_s is not None, f"not served though it registered:\n{prefill.log_text()}"
    assert requests.lost == 0, "a request failed after the registration; without the probe it would not have"


@pytest.mark.parametrize("same_data_port", [True, False], ids=["same data port", "another data port"])
def test_a_decode_node_that_restarts_and_does_not_register_is_not_let_in(
    pair: tuple[Node, Node], same_data_port: bool, record_fault: Record
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    decode.kill()
    requests.first_fails()
    data_port = decode.data_port
    another = decode.handshake_port + 1
    assert another != data_port
    decode.restart(data_port if same_data_port else another)  # Mooncake goes on sending to the first, for good
    assert requests.keep_coming(6) == 0
    assert requests.lost == 0, "let in because it answers, though every transfer to it fails"

    if not same_data_port:
        decode.restart(data_port)
    prefill.register(decode)
    after_s = requests.until_served(deadline_s=10)
    how = f"SIGKILL, {'same' if same_data_port else 'another'} data port"
    record_fault("restarts, registers after 6 s", how, lost=requests.lost, served_after_s=after_s)
    check(requests, after_s, prefill)
