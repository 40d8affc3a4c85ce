"""Does a decode node that fails again after each re-admission cost less and less, and is that forgotten in time?"""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable

from kit.node import Node

RELAPSES = 6
HOLDS_S = [1.0, 2.0] + [3.0] * (RELAPSES - 2)  # the longest hold is 3 s in place of 300 s
QUIET_S = 2.0  # in place of 60 s
SETTINGS = {
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
    "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "3",
    "SGLANG_FAILED_SESSION_PROBE_SETTLE_S": "0.05",
}


def holds_in(log: str) -> list[float]:
    return [float(line.split("held for ")[1].removesuffix("s")) for line in log.splitlines() if "held for " in line]


def test_a_flapping_decode_node_is_held_longer_each_time_and_a_quiet_spell_ends_that(
    tmp_path: pathlib.Path, record_fault: Callable[..., None]
) -> None:
    with Node("prefill", tmp_path / "prefill", **SETTINGS) as prefill, Node("decode", tmp_path / "decode") as decode:
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        prefill.ask("set_rule", "PROBATION_S", QUIET_S)

        prefill.misbehave("batch_transfer_sync_write", "gives", -1)  # while probes and reads work
        lost = []  # from when until when each of them was on its way
        while len(lost) <= RELAPSES:  # the first of them is what blacklisted it
            sent_at = time.monotonic()
            if "Failed to send" in prefill.send_to(decode):
                lost.append((sent_at, time.monotonic()))
            assert not lost or time.monotonic() - lost[-1][1] < 10, f"never let in; log:\n{prefill.log_text()}"
            time.sleep(0.01)
        gaps = [later[1] - earlier[0] for earlier, later in itertools.pairwise(lost)]
        prefill.wait_for_log("held for", times=RELAPSES)
        assert holds_in(prefill.log_text()) == HOLDS_S
        for gap, hold_s in zip(gaps[1:], HOLDS_S, strict=False):
            assert gap >= hold_s, f"a request was lost {gap:.2f} s after the last one, not {hold_s} s"

        prefill.misbehave("batch_transfer_sync_write", "works")
        served_s = prefill.wait_until_served(decode, deadline_s=10)
        record_fault("flapping", f"{RELAPSES} relapses", lost=RELAPSES, served_after_s=served_s)
        prefill.wait_for_recoveries(RELAPSES + 1)

        quiet_until = time.monotonic() + QUIET_S + 0.5
        while time.monotonic() < quiet_until:
            assert prefill.send_to(decode) == ""
            time.sleep(0.05)
        prefill.ask("fail", [decode.session])
        prefill.wait_until_served(decode, deadline_s=10)
        prefill.wait_for_recoveries(RELAPSES + 2)
        assert holds_in(prefill.log_text()) == HOLDS_S, "held for relapses that a quiet spell had ended"


def test_a_decode_node_that_fails_now_and_then_for_a_reason_of_the_prefills_own_is_never_held(
    tmp_path: pathlib.Path, record_fault: Callable[..., None]
) -> None:
    """As where the TCP queue is full for a moment. A relapse would be held for 1, 2, 4, ... s."""
    spells, of_s = 5, 1.5
    with Node("prefill", tmp_path / "prefill") as prefill, Node("decode", tmp_path / "decode") as decode:
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        out_s = 0.0
        for _ in range(spells):
            prefill.misbehave("batch_transfer_sync_write", "gives", -1)
            assert "Failed to send" in prefill.send_to(decode)
            prefill.misbehave("batch_transfer_sync_write", "works")
            out_s += prefill.wait_until_served(decode, deadline_s=10)
            works_until = time.monotonic() + of_s
            while time.monotonic() < works_until:
                assert prefill.send_to(decode) == ""
                time.sleep(0.05)
        prefill.wait_for_recoveries(spells)
        assert holds_in(prefill.log_text()) == [], "a healthy peer is out for longer than it takes to heal"
        record_fault("local failures", f"one for every {of_s:g} s of use", lost=0, served_after_s=out_s / spells)
