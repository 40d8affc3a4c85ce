"""Does the patch heal a build of SGLang whose session_lock its thread may take twice?"""

from __future__ import annotations

import pathlib

import pytest
from kit import changed_sglang
from kit.stock_node import ENABLE, Start, StockNode, is_served, recovers

pytestmark = pytest.mark.parametrize("release", ["0.5.23"], indirect=True, scope="session")


def test_a_blacklisted_session_is_used_again(
    start: Start, python: pathlib.Path, decode: StockNode, tmp_path: pathlib.Path
) -> None:
    path = changed_sglang.make(changed_sglang.LOCK_TAKEN_TWICE, python, tmp_path)
    prefill = start("prefill", PYTHONPATH=str(path), **{ENABLE: "1"}).make()
    decode.make()
    assert is_served(prefill, decode, register=True)
    prefill.ask("blacklist", session=decode.session)
    assert recovers(prefill, decode.session)
    assert is_served(prefill, decode)
    assert prefill.records(level="ERROR") == []
