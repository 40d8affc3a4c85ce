"""Does a session of the Ascend connector heal? Its manager is the one subclass of MooncakeKVManager.

Its transfer library runs on an NPU alone; Mooncake over TCP, which has the same methods, stands in for it.
"""

from __future__ import annotations

import pathlib

import pytest
from kit.stock_node import ENABLE, Start, Story, play_story

pytestmark = pytest.mark.every_release


@pytest.fixture(scope="module")
def story(start: Start, connectors: pathlib.Path) -> Story:
    if not (connectors / "ascend").is_dir():
        pytest.skip("this release has no Ascend connector")
    prefill, decode = start("prefill", **{ENABLE: "1"}), start("decode")
    for node in (prefill, decode):
        not_taken = node.ask("use_ascend")["not_taken"]
        if not_taken:
            pytest.skip(f"SGLang's own Ascend connector cannot send on this release: it takes no {not_taken}")
        node.make()
    return play_story(prefill, decode)


def test_a_stopped_decode_is_blacklisted_and_the_next_request_is_refused(story: Story) -> None:
    assert story.served_before
    assert story.blacklisted
    assert "is not alive" in story.refused.reason


def test_a_resumed_decode_recovers_and_serves_the_next_request(story: Story) -> None:
    assert story.recovered
    assert story.served_after
    assert story.counter == 1
