"""Is an operator told who is there and knows no probes, and nothing of that kind of who is stopped or gone?"""

from __future__ import annotations

import pathlib
import time

from kit.imposters import imposters
from kit.node import Node

TOLD = "takes connections but cuts every probe short"


def test_who_cuts_probes_short_is_told_and_who_is_stopped_or_gone_is_not_said_to(tmp_path: pathlib.Path) -> None:
    with (
        imposters("garbage") as [cuts_short],
        Node("prefill", tmp_path / "prefill") as prefill,
        Node("decode", tmp_path / "gone") as gone,
        Node("decode", tmp_path / "stopped") as stopped,
    ):
        for rule in ("LISTEN_AFTER_S", "LISTEN_GAP_S"):
            prefill.ask("set_rule", rule, 0)
        gone.kill()
        with stopped.stopped():
            prefill.ask("fail", [gone.session, stopped.session, cuts_short])
            prefill.wait_for_log(TOLD, deadline_s=10)
            time.sleep(2)  # each of the others is looked at several times, or hangs
            told = [line for line in prefill.log_text().splitlines() if TOLD in line]
            assert len(told) == 1, f"an operator looks for an old Mooncake where there is none: {told}"
            assert cuts_short in told[0]
