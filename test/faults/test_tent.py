"""Does a Mooncake without TENT, as all wheels are, work as ever where a variable of TENT is set?"""

from __future__ import annotations

import pathlib

from kit.node import Node


def test_a_variable_of_tent_changes_nothing_on_a_wheel_without_tent(tmp_path: pathlib.Path) -> None:
    tent = {"MC_USE_TENT": "1", "MC_USE_TEV1": "1"}
    with (
        Node("prefill", tmp_path / "prefill", **tent) as prefill,
        Node("decode", tmp_path / "decode", **tent) as decode,
    ):
        prefill.register(decode)
        assert prefill.send_to(decode) == ""
        prefill.blacklist(decode)
        prefill.wait_until_served(decode, deadline_s=10)
        prefill.wait_for_recoveries(1)
        assert "TENT" not in prefill.log_text()
        assert "without proof" not in prefill.log_text(), "its memory is not read"
