"""How many chunks a second does a stock transfer_worker send, with the patch and without?

Three stock SGLang 0.5.23 prefill managers send requests of many chunks to one decode node over real Mooncake, in turns:
one with the patch and two without, whose difference is the noise.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from kit.stock_node import ENABLE

from bench.cluster import Cluster, Decode, new_room
from bench.contenders import STOCK, WITH_WHEEL, Contender, ForkServers, Manager, fork_servers
from bench.progress import say

WITHOUT = "without"
CONTENDERS = [
    Contender(WITHOUT, STOCK, {ENABLE: "0"}),
    Contender("ours", WITH_WHEEL, {ENABLE: "1"}),
    Contender("without, another process", STOCK, {ENABLE: "0"}),
]
CHUNKS = 1000
ROUNDS = 25
BLACKLISTED = (0, 100)
SEND_DEADLINE_S = 60.0


def chunks_per_s(prefill: Manager, decode: Decode, chunks: int = CHUNKS) -> float:
    """One request of so many chunks, from the first that is queued to the end of the request."""
    room = new_room()
    prefill.ask("open_request", room=room)
    decode.manager.tell("hand_over", room=room, bootstrap=prefill.bootstrap)
    return chunks / float(prefill.ask("send_chunks", SEND_DEADLINE_S, room=room, number=chunks)["seconds"])


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """One row for each contender and length of the blacklist; those on it are closed ports."""
    with fork_servers() as started:
        return [row for blacklisted in BLACKLISTED for row in rows_of(started, blacklisted, rounds)]


def rows_of(fork_servers: ForkServers, blacklisted: int, rounds: int) -> list[dict[str, Any]]:
    """With fresh managers, so that none has a past."""
    with Cluster(fork_servers, contenders=CONTENDERS) as cluster:
        (decode,) = cluster.decodes
        cluster.blacklist(*(f"127.0.1.{1 + number}:9" for number in range(blacklisted)))
        rates: dict[str, list[float]] = {name: [] for name in cluster.prefills}
        for number in range(rounds + 1):
            say("chunks", f"{blacklisted} blacklisted, round {number} of {rounds}")
            for name, prefill in cluster.prefills.items():
                rate = chunks_per_s(prefill, decode)
                if number:  # the first is for warming up
                    rates[name].append(rate)
    return [row(name, blacklisted, rates) for name in rates]


def row(name: str, blacklisted: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    """The difference is that of one round; its spread is from the second to the last but one of the rounds' tenths."""
    differences = sorted(100 * (mine / without - 1) for mine, without in zip(rates[name], rates[WITHOUT], strict=True))
    tenth = len(differences) // 10
    return {
        "contender": name,
        "blacklisted": blacklisted,
        "chunks_per_s": round(statistics.median(rates[name])),
        "us_per_chunk": round(1e6 / statistics.median(rates[name])),
        "slowest_and_fastest": [round(min(rates[name])), round(max(rates[name]))],
        "difference_percent": round(statistics.median(differences), 1),
        "p10_and_p90": [round(differences[tenth], 1), round(differences[-1 - tenth], 1)],
    }


if __name__ == "__main__":
    for result in rows():
        print(json.dumps(result), flush=True)
