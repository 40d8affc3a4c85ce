"""Is a session let in because something else is on its port? And is the decode node, when it comes back?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit.imposters import imposters
from kit.network import Network
from kit.node import Node
from kit.traffic import Requests


@pytest.mark.parametrize("kind", ["echo", "failure", "silent", "garbage", "drip"])
def test_what_else_is_on_a_decode_nodes_port_is_not_let_in_and_the_node_is_when_it_is_back(
    network: Network, pair: tuple[Node, Node], kind: str, record_fault: Callable[..., None]
) -> None:
    prefill, decode = pair
    requests = Requests(prefill, decode)
    decode.kill()
    requests.first_fails()
    with imposters(kind, port=decode.handshake_port, network=network.path) as [session]:
        assert session == decode.session
        assert requests.keep_coming(6) == 0
        assert requests.lost == 0, f"let in because of a {kind} on its port"
        assert prefill.ask("blacklisted") == [decode.session]

    decode.restart()
    prefill.register(decode)
    after_s = requests.until_served(deadline_s=10)
    record_fault(f"something else on its port: {kind}", "SIGKILL, imposter", lost=requests.lost, served_after_s=after_s)
    assert after_s is not None, f"the decode node is back and refused:\n{prefill.log_text()}"
    assert requests.lost == 0, f"{requests.lost} requests were lost to a decode node that is well"
