"""What does a prefill node on one Mooncake see of a decode node on another, while faults come and pass?

The prefill nodes of all versions meet one decode node at the same time.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Optional

from kit.network import Network
from kit.stock_node import SOURCE_PAGES, TARGET_PAGES, Sent, StockNode, hand_over, is_blacklisted, recovers, send
from sglang.srt.disaggregation.mooncake import session_probe

VERSIONS = ["0.3.9", "0.3.10.post2", "0.3.11", "0.3.12", "0.3.13.post1", "0.3.14"]
FIRST_THAT_ASKS = session_probe.FIRST_MOONCAKE_WITH_PROBE
FIRST_THAT_ANSWERS = session_probe.FIRST_MOONCAKE_THAT_ANSWERS
FIRST_THAT_ACKNOWLEDGES = "0.3.12"

FAULT_S = 3.0
STAYS_OUT_S = 10.0  # who answers is let in after a good second, and by then it is told of who cuts probes short
BYTES_ARRIVE_WITHIN_S = 2.0
PAGES_OF_LOST_REQUESTS = [50, 51, 52, 53, 54]  # which no other request writes to: some arrive when the fault is over
REQUESTS_UNTIL_BLACKLISTED = 10  # if the pages arrive and only what is sent after them fails, nothing is blacklisted
SERVED = "served"


@dataclasses.dataclass
class Seen:
    """What was seen of a pair. None: not played, or it never came."""

    request: str = ""
    while_stopped: Optional[str] = None
    let_in_after_stop_s: Optional[float] = None
    request_after_stop: Optional[str] = None
    while_rejected: Optional[str] = None
    refused: Optional[str] = None
    let_in_after_s: Optional[float] = None
    request_after: Optional[str] = None
    request_with_registration: Optional[str] = None
    while_data_port_is_shut: Optional[str] = None
    request_after_shut_data_port: Optional[str] = None
    said_at_start: list[str] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Pair:
    """A prefill node, a decode node, and what was seen of them."""

    prefill_version: str
    decode_version: str
    prefill: StockNode
    decode: StockNode
    seen: Seen = dataclasses.field(default_factory=Seen)


def play(pairs: list[Pair], network: Network) -> None:
    """Plays all faults of one decode node with its prefill nodes; fills in what was seen."""
    decode = pairs[0].decode
    handshake_port, data_port = ports(decode, network)
    for pair in pairs:
        pair.seen.request = request(pair)
        pair.seen.said_at_start = [line for line in pair.prefill.records(level="WARNING") if "Session" not in line]
        for _ in range(REQUESTS_UNTIL_BLACKLISTED):
            if pair.seen.request != SERVED and not is_out(pair):
                request(pair)
    able = [pair for pair in pairs if pair.seen.request == SERVED]
    stop(able, decode)
    reject(able, network, handshake_port, data_port)
    shut_data_port([pair for pair in able if pair.seen.let_in_after_s], network, data_port)
    for pair in pairs:
        pair.seen.said = [line.replace(decode.session, "...") for line in pair.prefill.records(decode.session)]


def stop(pairs: list[Pair], decode: StockNode) -> None:
    """Stops the decode process in the middle of a request of each pair."""
    rooms = handed_over(pairs)

    def lose(pair: Pair) -> None:
        pair.seen.while_stopped = outcome(send(pair.prefill, rooms[pair.prefill_version][0]))

    def wait(pair: Pair) -> None:
        pair.seen.let_in_after_stop_s = let_in_after(pair)

    decode.stop()
    try:
        side_by_side(pairs, lose)
    finally:
        decode.resume()
    side_by_side([pair for pair in pairs if is_out(pair)], wait)
    for pair in pairs:
        pair.seen.request_after_stop = request(pair, register=is_out(pair))


def reject(pairs: list[Pair], network: Network, *ports: int) -> None:
    """Has both of decode's ports reject connections, which every version notices."""
    rooms = handed_over(pairs)

    def lose(pair: Pair) -> None:
        first, second = rooms[pair.prefill_version]
        pair.seen.while_rejected = outcome(send(pair.prefill, first))
        time.sleep(FAULT_S)
        pair.seen.refused = outcome(send(pair.prefill, second))

    def wait(pair: Pair) -> None:
        pair.seen.let_in_after_s = let_in_after(pair)

    with network.rejected(*ports):
        side_by_side(pairs, lose)
    side_by_side(pairs, wait)
    for pair in pairs:
        if is_out(pair):
            pair.seen.request_with_registration = request(pair, register=True)
        else:
            pair.seen.request_after = request(pair)


def shut_data_port(pairs: list[Pair], network: Network, port: int) -> None:
    """Has decode's data port reject connections while its handshake port answers."""
    rooms = handed_over(pairs)

    def lose(pair: Pair) -> None:
        first, second = rooms[pair.prefill_version]
        assert outcome(send(pair.prefill, first)) == "fails"
        time.sleep(FAULT_S)
        pair.seen.while_data_port_is_shut = outcome(send(pair.prefill, second))

    with network.rejected(port):
        side_by_side(pairs, lose)
    side_by_side(pairs, let_in_after)
    for pair in pairs:
        pair.seen.request_after_shut_data_port = request(pair)


def request(pair: Pair, register: bool = False) -> str:
    """Plays one request; says what became of it."""
    room = hand_over(pair.prefill, pair.decode, register)
    sent = send(pair.prefill, room)
    received = pair.decode.ask("finish", room=room, wait_s=10)["status"]
    if sent.status != "Success":
        return outcome(sent)
    if received != "Success":
        return f"success at prefill, {received} at decode"
    source = pair.prefill.ask("digest", pages=SOURCE_PAGES)
    deadline = time.monotonic() + BYTES_ARRIVE_WITHIN_S
    late = False
    while pair.decode.ask("digest", pages=TARGET_PAGES) != source:
        late = True
        if time.monotonic() > deadline:
            return "success without its bytes"
    return "success before its bytes" if late else SERVED


def outcome(sent: Sent) -> str:
    """What prefill says of a request, in a word."""
    if "is not alive" in sent.reason:
        return "refused"
    return {"Success": "success", "Failed": "fails"}.get(sent.status, "hangs")


def handed_over(pairs: list[Pair]) -> dict[str, list[int]]:
    """Two requests for each prefill node, to be sent during a fault."""
    return {
        pair.prefill_version: [hand_over(pair.prefill, pair.decode, pages=PAGES_OF_LOST_REQUESTS) for _ in range(2)]
        for pair in pairs
    }


def is_out(pair: Pair) -> bool:
    return is_blacklisted(pair.prefill, pair.decode.session)


def let_in_after(pair: Pair) -> Optional[float]:
    """Waits until decode's session is let in; gives the seconds, None if it stays out."""
    began = time.monotonic()
    return time.monotonic() - began if recovers(pair.prefill, pair.decode.session, STAYS_OUT_S) else None


def side_by_side(pairs: list[Pair], do: Callable[[Pair], object]) -> None:
    """Does that with all prefill nodes at once. It must leave the decode node alone."""
    with concurrent.futures.ThreadPoolExecutor(len(VERSIONS)) as threads:
        list(threads.map(do, pairs))


def ports(decode: StockNode, network: Network) -> tuple[int, int]:
    """Mooncake's handshake port and data port; it takes both from below the range that the kernel gives ports from."""
    handshake = int(decode.session.rpartition(":")[2])
    first_of_kernel = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    (data,) = {port for port in network.listening_ports(decode.pid) if port < first_of_kernel} - {handshake}
    return handshake, data
