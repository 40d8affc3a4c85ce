"""Is SGLang as it was when the switch is off or not set, and does every word for on and off count?"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Optional

import pytest
from kit.releases import RELEASES
from kit.stock_node import ENABLE, Refused, Start, StockNode, hand_over, is_blacklisted, is_served, recovers, send

Prefill = Callable[[Optional[str]], StockNode]

# Unset (None) on each release; each word where it tells most: 0.5.23 has a probe of its own, on unless the switch is
# off, and knows fewer words for that than we do.
FURTHER_WORDS = {"0.5.8.post1": ["maybe"], "0.5.12.post1": ["0"], "0.5.23": ["0", "off", "On"]}
WORDS: dict[str, list[Optional[str]]] = {release: [None, *FURTHER_WORDS.get(release, [])] for release in RELEASES}
OFF = [(release, word) for release in RELEASES for word in WORDS[release] if word in (None, "0", "off")]
NATIVE = {"SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1"}
WATCHED_S = 3.0  # with the switch on, a session that answers is let in after a second


def of(cases: list[tuple[str, Optional[str]]]) -> pytest.MarkDecorator:
    here = [case for case in cases if case[0] in RELEASES]
    return pytest.mark.parametrize(("release", "word"), here, indirect=["release"], scope="session")


@pytest.fixture(scope="module")
def prefill(start: Start, release: str, decode: StockNode) -> Prefill:
    """Gives the prefill node whose switch is set to a word."""
    nodes = {word: start("prefill", **NATIVE, **({} if word is None else {ENABLE: word})) for word in WORDS[release]}
    decode.make()
    for word, node in nodes.items():
        if word != "maybe":
            node.make()
    return nodes.__getitem__


@pytest.mark.every_release
@of(OFF)
def test_off_or_unset_leaves_sglangs_classes_and_blacklist_alone(
    prefill: Prefill, word: Optional[str], record_property: Callable[[str, str], None]
) -> None:
    code = prefill(word).ask("code")
    if word is None:
        runs = prefill(word).ask("state")["probe_loops"]
        record_property("native probe", ("on" if runs else "off") if code["native_probe"] else "none")
    assert code["foreign_methods"] == []
    assert code["plain_blacklist"]
    assert not code["wrapt"]


@pytest.mark.every_release
@of(OFF)
def test_off_or_unset_starts_no_probe_thread_and_a_session_stays_blacklisted(
    prefill: Prefill, decode: StockNode, release: str, word: Optional[str]
) -> None:
    if (release, word) == ("0.5.23", None):
        pytest.skip("unset, SGLang's own probe runs on this release")
    node = prefill(word)
    assert node.ask("state")["probe_loops"] == []
    assert is_served(node, decode, register=True)
    node.ask("blacklist", session=decode.session)
    time.sleep(WATCHED_S)
    assert is_blacklisted(node, decode.session)
    assert "is not alive" in send(node, hand_over(node, decode)).reason


@pytest.mark.every_release
@of(OFF)
def test_off_or_unset_registers_no_metric(prefill: Prefill, connectors: pathlib.Path, word: Optional[str]) -> None:
    if "failed_session_recoveries_total" in (connectors / "mooncake" / "conn.py").read_text():
        pytest.skip("SGLang registers it itself on this release")
    assert prefill(word).ask("counter")["value"] is None


@pytest.mark.every_release
@of([("0.5.23", None)])
def test_unset_leaves_sglangs_native_probe_running_and_healing(
    prefill: Prefill, decode: StockNode, word: Optional[str]
) -> None:
    node = prefill(word)
    (file,) = node.ask("state")["probe_loops"]
    assert file.startswith(node.ask("code")["sglang"])
    node.ask("blacklist", session=decode.session)
    assert recovers(node, decode.session)


@of([("0.5.23", "On")])
def test_a_word_for_on_that_sglang_does_not_know_starts_our_probe(
    prefill: Prefill, decode: StockNode, word: Optional[str]
) -> None:
    node = prefill(word)
    (file,) = node.ask("state")["probe_loops"]
    assert not file.startswith(node.ask("code")["sglang"])
    node.ask("blacklist", session=decode.session)
    assert recovers(node, decode.session)


@of([("0.5.8.post1", "maybe")])
def test_a_word_that_is_neither_stops_the_prefill(prefill: Prefill, word: Optional[str]) -> None:
    with pytest.raises(Refused, match=rf"^{ENABLE}='maybe' is not allowed: .*true.*false"):
        prefill(word).make()
