"""Is what clients lose behind a router counted right, and are the flags that are played those of the docs?"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from kit.paths import CHECKOUT

from demo.servers import Server
from router import clients, cut, grid, stock_router, story
from router.clients import Request
from router.tally import Tally, tally

spec = importlib.util.spec_from_file_location("router_table", CHECKOUT / "tools/router_table.py")
assert spec is not None
assert spec.loader is not None
router_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(router_table)


def event(reason: object, decode: str = "decode-2") -> str:
    return json.dumps({"output_ids": [1], "meta_info": {"finish_reason": reason, "weight_version": decode}})


ENDED = {"type": "length", "length": 8}
ABORTED = {"type": "abort", "message": "is not alive"}


@pytest.mark.parametrize(
    ("status", "text", "streaming", "served", "says"),
    [
        (200, event(ENDED), False, True, ""),
        (200, f"data: {event(None)}\n\ndata: {event(ENDED)}\n\ndata: [DONE]\n\n", True, True, ""),
        (200, f"data: {event(ABORTED)}\n\ndata: [DONE]\n\n", True, False, "is not alive"),
        (200, f"data: {event(None)}\n\ndata: {event(ABORTED)}\n\ndata: [DONE]\n\n", True, False, "is not alive"),
        (200, event(ABORTED), False, False, "is not alive"),
        (200, f"data: {event(None)}\n\n", True, False, "aborted"),
        (200, "data: [DONE]\n\n", True, False, "cut short"),
        (200, "data: {'error': {\"message\": 1}}", True, False, "cut short"),
        (200, "", False, False, "cut short"),
        (503, "No available decode workers", True, False, "No available"),
    ],
)
def test_an_answer_is_one_only_if_its_finish_reason_says_so(
    status: int, text: str, streaming: bool, served: bool, says: str
) -> None:
    seen, said, _ = clients.judged(status, text, streaming)
    assert seen is served
    assert says in said


def test_an_answer_names_the_decode_node_that_gave_it() -> None:
    assert clients.judged(200, event(ENDED, "decode-1"), streaming=False)[2] == "decode-1"
    assert clients.judged(200, f"data: {event(ABORTED, 'decode-1')}\n", streaming=True)[2] == "decode-1"


def test_so_many_requests_a_second_are_sent_though_none_is_answered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        traffic = clients.Clients(silent.getsockname()[1], streaming=False, per_s=5)
        traffic.begin()
        time.sleep(2.2 / 5)
        assert traffic.on_their_way() == 3
        assert traffic.requests() == []
        traffic.stop()
    traffic.wait()  # the listener is gone, and so are their connections
    assert [each.served for each in traffic.requests()] == [False] * 3


def served(sent: float, ended: float, decode: str = "decode-2") -> Request:
    return Request(sent, ended, True, "", decode)


def failed(sent: float, ended: float) -> Request:
    return Request(sent, ended, False, "HTTP 500", "")


def test_what_a_fault_cost_is_counted_from_the_heal_on() -> None:
    requests = [
        served(99.0, 99.125, "decode-1"),
        failed(101.0, 104.0),
        served(100.0, 110.5, "decode-2"),
        failed(108.0, 110.5),
        failed(110.9, 111.0),
        served(111.0, 111.25, "decode-1"),
        served(112.0, 112.1, "decode-1"),
    ]
    assert tally(requests, healed=110.0, ended=130.0, decode="decode-1") == Tally(
        requests=7,
        failed=3,
        failed_after_heal=2,
        last_failure_s=1.0,
        over=True,
        slowest_served_s=10.5,
        slowest_failed_s=3.0,
        again_s=1.25,
    )


def test_who_fails_at_the_end_of_the_watch_is_taken_to_fail_for_good() -> None:
    assert not tally([failed(128.0, 128.1)], 110.0, 130.0, "decode-1").over
    assert tally([failed(126.0, 129.0), served(128.0, 128.1)], 110.0, 130.0, "decode-1").over


def test_a_fault_that_nobody_noticed() -> None:
    seen = tally([served(100.0, 101.0)], 110.0, 130.0, "decode-1")
    assert (seen.failed, seen.last_failure_s, seen.over, seen.again_s) == (0, None, True, None)


SS = """\
LISTEN 0 128 127.0.0.1:15870 0.0.0.0:* users:(("sglang::schedul",pid=77,fd=80))
LISTEN 0 128         *:16999       *:* users:(("sglang::schedul",pid=77,fd=81))
LISTEN 0 128 127.0.0.1:41000 0.0.0.0:* users:(("sglang::schedul",pid=77,fd=82))
LISTEN 0 128 127.0.0.1:15871 0.0.0.0:* users:(("sglang::schedul",pid=771,fd=80))
"""


def test_only_the_schedulers_own_mooncake_ports_are_cut_off() -> None:
    assert cut.mooncake_ports(SS, 77) == [15870, 16999]
    assert cut.mooncake_ports(SS, 7) == []


CUT = """
import os, socket, subprocess
from router import cut

def reachable():
    try:
        socket.create_connection(("127.0.0.1", 15001), 1).close()
    except ConnectionRefusedError:
        return False
    return True

host = os.readlink("/proc/self/ns/net")
cut.own_network()
listener = socket.create_server(("127.0.0.1", 15001))
seen = [reachable()]
try:
    with cut.cut_off(os.getpid()):
        seen.append(reachable())
        raise KeyboardInterrupt
except KeyboardInterrupt:
    seen.append(reachable())
rules = subprocess.run(["iptables", "-S", "INPUT"], capture_output=True, text=True).stdout.splitlines()
print(seen, rules[1:], os.readlink("/proc/self/ns/net") != host)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("iptables"), reason="rejecting packets takes root and iptables"
)
def test_a_cut_ends_with_its_block_and_is_nobody_elses() -> None:
    done = subprocess.run([sys.executable, "-c", CUT], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[True, False, True] [] True\n", done.stderr


def test_the_router_is_given_the_nodes_and_the_flags() -> None:
    prefill, decode = (Server(None, port, bootstrap) for port, bootstrap in ((1, 2), (3, 4)))  # type: ignore[arg-type]
    words = " ".join(stock_router.arguments(grid.FLAGS[grid.ADVISED], prefill, [decode, decode], 5, 6))
    assert words.startswith("-m sglang_router.launch_router --pd-disaggregation --prefill http://127.0.0.1:1 2 ")
    assert words.count("--decode http://127.0.0.1:3") == 2
    assert words.endswith(" ".join(grid.FLAGS[grid.ADVISED]))


def test_the_flags_that_are_played_are_those_that_the_docs_give() -> None:
    for page in ("docs/operations.md", "docs/router.md"):
        assert " ".join(grid.FLAGS[grid.ADVISED]) in (CHECKOUT / page).read_text(), page


@pytest.mark.parametrize("rounds", [grid.ROUNDS, grid.QUICK])
def test_no_trial_is_played_on_servers_that_an_earlier_one_has_spoilt(rounds: list[list[grid.Trial]]) -> None:
    for trials in rounds:
        assert all(each.fault_s is not None for each in trials[:-1]), "a decode node was killed"
        without = [number for number, each in enumerate(trials) for cell in each.cells if not cell.patch]
        assert without in ([], [0]), "this prefill node refuses the decode node for good"
        for each in trials:
            assert len(set(grid.placed(each).values())) == len(each.cells), "two routers before one prefill node"


LIKE = {"flags": "defaults", "decodes": 2, "streaming": True, "patch": True, "version": "0.3.2", "per_s": 2.0}
COUNTED = {
    "requests": 200,
    "failed": 7,
    "failed_after_heal": 1,
    "last_failure_s": 0.42,
    "over": True,
    "slowest_served_s": 0.5,
    "slowest_failed_s": 0.04,
    "again_s": 1.31,
}


def line(fault_s: float | None = 9, patch: bool = True, **tally: object) -> str:
    cell = {**LIKE, "patch": patch}
    how = "killed" if fault_s is None else "rejected"
    seen = {"cell": cell, "how": how, "fault_s": fault_s, "watch_s": 40, "attempts": 250}
    return json.dumps({**seen, "tally": {**COUNTED, **tally}})


def test_a_row_says_what_was_lost_and_what_it_cost() -> None:
    assert router_table.row(json.loads(line())) == (
        "| 9 s | 2, streaming | 0.3.2, defaults | 7 of 200 | 0.4 s | 0.5 s | 0.0 s | 1.2 | 1.3 s |"
    )
    nothing = router_table.row(json.loads(line(failed=0, last_failure_s=None)))
    assert "| 0 of 200 | - | 0.5 s | - |" in nothing


def test_what_is_not_over_is_no_figure() -> None:
    row = router_table.row(json.loads(line(patch=False, failed=102, over=False, last_failure_s=39.9, again_s=None)))
    assert "without the patch" in row
    assert "| 102 of 200 | not over after 40 s |" in row
    assert row.endswith("| not seen |")


def test_the_page_keeps_all_but_its_table(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "router.md"
    page.write_text(f"before\n{router_table.BEGIN}old\n{router_table.END}after\n")
    router_table.write(page, [line(fault_s=None), line(), line(patch=False)])
    text = page.read_text()
    assert text.startswith(f"before\n{router_table.BEGIN}")
    assert text.endswith(f"{router_table.END}after\n")
    assert "old" not in text
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    assert ["without" in rows[0], rows[1][:5], rows[2][:8]] == [True, "| 9 s", "| killed"]


def told(patch: bool, **different: object) -> story.Outcome:
    return story.Outcome(pathlib.Path(), patch, 40.0, Tally(**{**COUNTED, **different}), "10.0.3.7:15412")  # type: ignore[arg-type]


def test_the_demo_wants_the_patch_to_end_it_and_its_absence_not_to() -> None:
    assert told(patch=True).problems() == []
    assert told(patch=False, over=False, failed=102).problems() == []
    assert told(patch=False).problems() != []
    assert told(patch=True, over=False).problems() != []
    assert told(patch=True, last_failure_s=3.5).problems() != []
    assert told(patch=True, failed=0).problems() != []


def test_the_demos_table_names_the_session_and_says_what_is_not_over() -> None:
    with_us, without = told(patch=True).cells(), told(patch=False, over=False, again_s=None, failed=102).cells()
    assert list(with_us) == list(without)
    assert with_us["refused session"] == "10.0.3.7:15412"
    assert without["failed"] == "102 (51%)"
    assert without["last failure after the heal"] == "still failing after 40 s"
    assert without["decode-1 serves again"] == "never"


def test_the_session_is_the_one_that_prefill_refuses() -> None:
    refusal = "Decode instance could be dead, remote mooncake session 127.0.0.1:15412 is not alive"
    assert story.refused_session(f"a line\n{refusal}\nanother") == "127.0.0.1:15412"
    assert story.refused_session("a line") == ""
