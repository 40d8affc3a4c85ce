"""Does a blacklisted decode session heal on stock SGLang, with our wheel installed and the switch on?"""

from __future__ import annotations

import json
import pathlib
import subprocess
import time
from collections import Counter

import pytest
from kit.releases import MOONCAKE
from kit.stock_node import (
    ENABLE,
    Refused,
    Start,
    StockNode,
    Story,
    clean_environment,
    counts,
    is_blacklisted,
    is_served,
    play_story,
    recovers,
)

pytestmark = pytest.mark.every_release

RECOVERED = "Session %s recovered via probe; un-blacklisted"
OUR_METHODS = [
    "MooncakeKVManager.__init__",
    "MooncakeKVManager._failed_session_probe_loop",
    "MooncakeKVManager._run_one_probe_pass",
    "MooncakeTransferEngine.send_probe",
]
LOOP_STARTED = "Starting failed-session probe loop (interval=30.0s)"
SECONDS = [
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S",
    "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S",
    "SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S",
    "SGLANG_FAILED_SESSION_PROBE_SETTLE_S",
]
SETTLE = SECONDS[-1]
CONCURRENCY = "SGLANG_FAILED_SESSION_PROBE_CONCURRENCY"
VERIFY = "SGLANG_FAILED_SESSION_PROBE_VERIFY"
WRONG = [
    *((name, value) for name in [*SECONDS, CONCURRENCY] for value in ("nan", "inf", "-1", "abc")),
    *((name, "0") for name in [*SECONDS, CONCURRENCY] if name != SETTLE),
    (CONCURRENCY, "1.5"),
    (VERIFY, "maybe"),
    (ENABLE, "maybe"),
]


@pytest.fixture(scope="module")
def prefill(start: Start, decode: StockNode) -> StockNode:
    """A prefill node with the switch on; the decode node imports at the same time."""
    node = start("prefill", **{ENABLE: "1"}).make()
    decode.make()
    return node


@pytest.fixture(scope="module")
def story(prefill: StockNode, decode: StockNode) -> Story:
    return play_story(prefill, decode)


def test_a_request_is_served_before_the_fault(story: Story) -> None:
    assert story.served_before


def test_a_stopped_decode_fails_the_request_and_is_blacklisted(story: Story) -> None:
    assert story.failed.status == "Failed"
    assert "Failed to send kv chunk" in story.failed.reason
    assert 4.5 < story.failed_after_s < 20  # as MC_TRANSFER_TIMEOUT says, and not 30
    assert story.blacklisted


def test_sglang_works_off_the_requests_for_one_session_in_order(story: Story) -> None:
    """Its transfer threads (four by default) look a session up once the transfer before has ended. So a second look
    says that the first transfer went through: a peer's work is measured by that.
    """
    assert "is not alive" in story.behind_it.reason, "two transfers to one session were under way together"


def test_the_next_request_is_refused_in_sglangs_own_words(story: Story, decode: StockNode) -> None:
    assert story.refused.status == "Failed"
    assert f"remote mooncake session {decode.session} is not alive" in story.refused.reason


def test_a_resumed_decode_recovers_within_5_s_and_serves_the_next_request(story: Story) -> None:
    assert story.recovered
    assert story.served_after


def test_the_recovery_is_counted_once_and_leaves_nothing_behind(story: Story, prefill: StockNode) -> None:
    assert story.counter == 1
    state = prefill.ask("state")
    assert state["failed_sessions"] == []
    assert state["session_failures"] == {}


def test_the_command_sessions_shows_the_session_on_probation_and_the_rank_that_let_it_in(
    story: Story, prefill: StockNode, decode: StockNode, python: pathlib.Path
) -> None:
    assert story.recovered
    command = [python.with_name("sglang-failed-session-probe"), "sessions", "--json"]
    deadline = time.monotonic() + 10
    while True:  # it is written a second later
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
        rows = {row["session"]: row for row in json.loads(done.stdout) if row["pid"] == prefill.pid}
        if (row := rows.get(decode.session)) and not row["blacklisted"]:
            break
        assert time.monotonic() < deadline, f"not there: {done.stdout}{done.stderr}"
        time.sleep(0.2)
    assert row["rank"].endswith("TP0")
    assert row["why"].startswith("let in again, on probation for ")


def test_sglangs_own_classes_have_our_methods_and_no_others(prefill: StockNode) -> None:
    assert prefill.ask("code")["foreign_methods"] == OUR_METHODS


def test_exactly_one_probe_thread_runs_and_its_loop_is_ours(prefill: StockNode, python: pathlib.Path) -> None:
    (file,) = prefill.ask("state")["probe_loops"]
    assert pathlib.Path(file).is_relative_to(python.parent.parent)


def test_the_log_says_the_texts_that_operators_grep_for_once_each(
    story: Story, prefill: StockNode, decode: StockNode
) -> None:
    assert prefill.records("Starting failed-session probe loop") == [LOOP_STARTED]
    (recovered,) = prefill.records("recovered via probe")
    assert recovered.startswith(RECOVERED % decode.session)
    assert recovered.endswith(" requests refused)")


def test_one_info_line_names_the_versions_and_the_settings(prefill: StockNode, release: str) -> None:
    (line,) = prefill.records(MOONCAKE, level="INFO")
    assert release in line
    for part in ("interval=30s", "max_interval=300s", "idle_timeout=600s", "settle=1s", "verify=on", "concurrency=16"):
        assert part in line


def test_the_log_warns_of_the_blacklisting_and_has_no_error_but_sglangs_own(
    story: Story, prefill: StockNode, decode: StockNode
) -> None:
    assert prefill.records(level="ERROR") == [f"Session {decode.session} failed."]
    first, *more = prefill.records(level="WARNING")
    assert first.startswith(f"Session {decode.session} is blacklisted")
    assert all("answers probes, but reading its memory gave -1" in line for line in more), "one lane was dead, at most"


def test_a_decode_manager_has_no_blacklist_and_no_probe_thread(decode: StockNode, prefill: StockNode) -> None:
    state = decode.ask("state")
    assert state["failed_sessions"] is None
    assert [name for name in state["threads"] if "Session" in name or "Probe" in name] == []


def test_a_registration_clears_the_blacklist_without_counting_as_a_recovery(
    prefill: StockNode, decode: StockNode
) -> None:
    for _ in range(5):
        before, began = prefill.ask("counter"), time.monotonic()
        prefill.ask("blacklist", session=decode.session)
        assert is_served(prefill, decode, register=True)
        came_first = time.monotonic() - began < 1.0  # else probes may have let it in: they settle in a second
        assert not is_blacklisted(prefill, decode.session)
        time.sleep(1.5)  # a probe that was out at the registration has long been answered and would have settled
        if came_first:
            break
    assert came_first, "this machine is too slow to register within a second"
    assert prefill.ask("counter") == before


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_setting_stops_the_prefill_with_one_sentence(prefill: StockNode, name: str, value: str) -> None:
    threads = prefill.ask("state")["threads"]
    with pytest.raises(Refused) as refused:
        prefill.make(**{name: value})
    sentence = str(refused.value)
    assert name in sentence
    assert value in sentence
    allowed = {ENABLE: "true", VERIFY: "true", CONCURRENCY: "whole number"}.get(name, "finite number of seconds")
    assert allowed in sentence
    assert "\n" not in sentence
    assert sentence.rstrip(".").count(". ") == 0
    assert not Counter(prefill.ask("state")["threads"]) - Counter(threads)  # workers of a probe before may have ended


def test_an_interval_over_the_longest_stops_the_prefill_and_names_both(prefill: StockNode) -> None:
    interval, longest = SECONDS[:2]
    with pytest.raises(Refused, match=rf"{interval}.*400.*{longest}.*300"):
        prefill.make(**{interval: "400", longest: "300"})


def test_no_session_is_lost_that_fails_while_the_manager_starts(prefill: StockNode, decode: StockNode) -> None:
    dead = [f"127.0.1.{i}:1" for i in range(1, 101)]
    before = prefill.ask("counter")["value"]
    prefill.ask("make_while_transfers_fail", session=decode.session, more=dead)
    state = prefill.ask("state")
    assert set(dead) <= set(state["failed_sessions"])
    assert set(dead) <= set(state["session_failures"])
    assert recovers(prefill, decode.session)
    assert counts(prefill, before + 1)
