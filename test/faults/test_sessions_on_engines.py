"""Does the command `sessions` tell an operator which decode nodes are out on this node, and why? On real engines."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from kit.node import Node
from kit.paths import PYTHON_FOLDER


def sessions(*schedulers: Node) -> dict[tuple[int, str], dict[str, Any]]:
    """What the command says of these schedulers, by scheduler and session. Others may run on this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_failed_session_probe", "sessions", "--json"],
        env={**os.environ, "PYTHONPATH": str(PYTHON_FOLDER)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    numbers = {scheduler.process.pid: number for number, scheduler in enumerate(schedulers)}
    rows = json.loads(done.stdout)
    return {(numbers[row["pid"]], row["session"]): row for row in rows if row["pid"] in numbers}


def test_each_scheduler_of_a_node_says_which_decode_nodes_are_out_and_why(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:

        def node(role: str, name: str) -> Node:
            return stack.enter_context(Node(role, tmp_path / name))

        first, second, killed = (node("prefill", name) for name in ("first", "second", "killed"))
        hung, gone, unreadable, flapping, well = (
            node("decode", name) for name in ("hung", "gone", "unreadable", "flapping", "well")
        )
        for prefill in (first, second, killed):
            for decode in (hung, gone, unreadable, flapping, well):
                prefill.register(decode)
                assert prefill.send_to(decode) == ""
        assert sessions(first, second, killed) == {}

        stack.enter_context(hung.stopped())
        gone.kill()
        second.misbehave("transfer_check_status", "gives", -1, unreadable.session)
        first.ask("fail", [hung.session, gone.session, well.session, flapping.session])
        second.ask("fail", [gone.session, unreadable.session])
        killed.ask("fail", [gone.session])
        for _ in range(3):
            assert "is not alive" in first.send_to(gone)
        for _ in range(5):  # held for 1, 2, 4, 8 and 16 s
            first.wait_until_served(flapping, deadline_s=20)
            first.ask("fail", [flapping.session])
        time.sleep(2)
        seen = sessions(first, second, killed)
        whys = {key: row["why"] for key, row in seen.items()}
        assert sorted(whys) == sorted(
            [
                *((0, decode.session) for decode in (hung, gone, flapping, well)),
                *((1, decode.session) for decode in (gone, unreadable)),
                (2, gone.session),
            ]
        )
        assert whys[0, hung.session].startswith("its probe hangs, for ")
        assert whys[0, gone.session] == whys[1, gone.session] == whys[2, gone.session] == "it does not answer"
        assert seen[0, gone.session]["last_probe"] == "refused"
        assert seen[0, gone.session]["refused"] == 3
        assert "; held for " in whys[0, flapping.session]
        assert 0 < seen[0, flapping.session]["held_for_s"] < 16
        assert whys[0, well.session].startswith("let in again, on probation for ")
        assert whys[1, unreadable.session].startswith("it answers, but reading its memory gave -1")
        assert seen[1, unreadable.session]["last_probe"] == "answered"
        assert 5 < seen[0, gone.session]["out_s"] < 60

        killed.kill()
        assert {scheduler for scheduler, _ in sessions(first, second, killed)} == {0, 1}, "a dead scheduler's rows stay"
        first.ask("teardown")
        assert {scheduler for scheduler, _ in sessions(first, second)} == {1}, (
            "rows of a manager that is torn down stay"
        )
        second.misbehave("transfer_check_status", "works", None, unreadable.session)
        second.wait_until_served(unreadable, deadline_s=10)
        deadline = time.monotonic() + 5
        while (row := sessions(second)[0, unreadable.session])["blacklisted"]:
            assert time.monotonic() < deadline, "a session that is in use again is shown as refused"
        assert row["why"].startswith("let in again")
