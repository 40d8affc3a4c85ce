"""Which lines does an operator read, and how few when a rack goes? In virtual time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sglang.srt.disaggregation.mooncake import session_probe, session_watch
from sglang.srt.disaggregation.mooncake.session_watch import Event
from sglang.srt.observability.failed_session_log import LINES_IN_A_SPELL, SPELL_S, FailedSessionLog

D = "decode:7001"
RACK = [f"decode:{port}" for port in range(1, 1001)]
LEFT_OUT = len(RACK) - LINES_IN_A_SPELL
LOGGER = "sglang.srt.disaggregation.mooncake.conn"


class Story:
    """A log, its clock and what it has said."""

    def __init__(self, caplog: pytest.LogCaptureFixture, can_probe: bool = True) -> None:
        caplog.set_level(logging.INFO)
        self.now = 0.0
        self.log = FailedSessionLog(can_probe, clock=lambda: self.now)
        self._caplog = caplog

    def hear(self, event: Event, *sessions: Any, **details: Any) -> None:
        for session in sessions:
            self.log.heard(event, session, details)

    def blacklist(self, *sessions: Any, relapses: int = 0) -> None:
        self.hear(Event.BLACKLISTED, *sessions, relapses=relapses)

    def let_in(self, *sessions: Any, unverified: str | None = None) -> None:
        self.hear(Event.RECOVERED, *sessions, outage_s=12.34, refused=4, unverified=unverified)

    def lines(self) -> list[tuple[str, str]]:
        """What was said since the last time, as level and text."""
        records = self._caplog.records[:]
        self._caplog.clear()
        assert {record.name for record in records} <= {LOGGER}, "operators filter by SGLang's logger"
        return [(record.levelname, record.getMessage()) for record in records]


@pytest.fixture
def story(caplog: pytest.LogCaptureFixture) -> Story:
    return Story(caplog)


@pytest.mark.parametrize("is_short", [True, False])
def test_a_queue_that_a_burst_can_have_stuck_is_named_as_a_cause_only_where_it_can_be_one(
    is_short: bool, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_probe, "has_short_queue", lambda: is_short)
    story.hear(Event.UNREADABLE, D, why="reading its memory gave -1", outage_s=1.06)
    ((_, line),) = story.lines()
    assert ("set MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER=65535" in line) == is_short
    assert line.endswith("and that decode node") != is_short


def test_each_event_of_a_session_is_one_line(story: Story) -> None:
    story.blacklist(D)
    story.hear(Event.UNREADABLE, D, why="reading its memory gave -1", outage_s=1.06)
    story.hear(Event.CUTS_SHORT, D, outage_s=10.26)
    story.let_in(D)
    story.blacklist(D, relapses=1)
    story.hear(Event.HELD, D, hold_s=1.0, relapses=1)
    story.hear(Event.DROPPED, D, idle_s=600.2, outage_s=650.04, refused=7)
    story.hear(Event.MALFORMED, "nonsense")
    story.hear(Event.VERIFICATION_OFF, D)
    story.hear(Event.FAULT, D, traceback="Traceback: a fault of our own")
    assert story.lines() == [
        (
            "WARNING",
            f"Session {D} is blacklisted, because a transfer to it failed: requests for it are refused; "
            "it is probed until it can be used again",
        ),
        (
            "WARNING",
            f"Session {D} answers probes, but reading its memory gave -1, so it stays blacklisted (for 1.1 s by now). "
            "If it goes on, look at the data path between this node and that decode node",
        ),
        (
            "WARNING",
            f"Session {D} takes connections but cuts every probe short (for 10.3 s by now): it stays blacklisted until "
            "it answers or registers again. Mooncake before 0.3.10.post2 does that (look at its version on that decode "
            "node), or a proxy for a process that is gone",
        ),
        ("INFO", f"Session {D} recovered via probe; un-blacklisted (out for 12.3 s, 4 requests refused)"),
        ("WARNING", f"Session {D} (relapse 1) failed again soon after its recovery; held for 1s"),
        ("INFO", f"Forgot blacklisted session {D}: no request for 600s (out for 650.0 s, 7 requests refused)"),
        ("WARNING", "Session id 'nonsense' is not host:port with a port from 1 to 65535: it is never probed"),
        (
            "WARNING",
            f"Session {D} works though its memory cannot be read: reads prove nothing on this transport, "
            "so from now on this process lets sessions in when they answer probes",
        ),
        (
            "ERROR",
            f"Failed-session probe: a fault of its own at session {D}, said once; SGLang is not affected\n"
            "Traceback: a fault of our own",
        ),
    ]


FORGED = "x\n[2026-11-28 06:00:00] INFO Session decode:7001 recovered via probe; un-blacklisted"
EVIL = [
    FORGED,
    "x\r\x1b[2K\x1b[31mred",
    "a\u2028b\u202egnp.exe\x00\x7f",
    "\udcff:1",
    "a" * 100_000,
    "a" * 100_000 + ":7001",
    ("tuple\n",),
]


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_what_comes_from_outside_can_neither_forge_a_line_nor_reach_a_terminal(text: Any, story: Story) -> None:
    story.blacklist(text)
    story.hear(Event.UNREADABLE, text, why=text, outage_s=1.06)
    story.hear(Event.CUTS_SHORT, text, outage_s=10.26)
    story.let_in(text, unverified=text)
    story.hear(Event.HELD, text, hold_s=1.0, relapses=1)
    story.hear(Event.DROPPED, text, idle_s=600.2, outage_s=650.04, refused=7)
    story.hear(Event.MALFORMED, text)
    story.hear(Event.VERIFICATION_OFF, text)
    story.hear(Event.FAULT, text, traceback=f"Traceback:\nValueError: {text}")
    story.log.probe_raised(text, RuntimeError(text))
    story.log.page_refused(str(text))
    lines = story.lines()
    assert len(lines) >= 11
    for _, said in lines:
        first, *others = said.split("\n")
        assert first.isprintable()
        assert all(line.isprintable() for line in others)
        assert all(line.startswith(("Traceback", "  ")) for line in others), "a line that nobody has logged"
        assert len(said) < 2000, "whoever registers such an id fills the disk"


def test_a_session_id_with_the_longest_host_is_told_whole(story: Story) -> None:
    session = "d" * 253 + ":65535"
    story.let_in(session)
    ((_, line),) = story.lines()
    assert line.startswith(f"Session {session} recovered via probe; un-blacklisted (")


def test_a_session_that_is_let_in_without_proof_is_told_with_the_reason(story: Story) -> None:
    story.let_in(D, unverified="reading its memory gave -1")
    (_, recovered), (level, why) = story.lines()
    assert recovered.startswith(f"Session {D} recovered via probe; un-blacklisted")
    assert level == "WARNING"
    assert why == (
        f"Session {D} was let in on probation without proof that transfers work: it answers probes, but reading its "
        "memory gave -1. If it fails again, look at the data path between this node and that decode node"
    )


def test_a_page_that_mooncake_refuses_is_told_with_what_follows_from_it(story: Story) -> None:
    story.log.page_refused("Mooncake gave -1 when it was to register a page to read into")
    assert story.lines() == [
        (
            "WARNING",
            "Failed-session probe: Mooncake gave -1 when it was to register a page to read into, so no peer's memory "
            "can be read for now: sessions are let in when they answer probes. It is tried again",
        )
    ]


def test_nobody_is_told_that_a_session_is_probed_which_is_not(story: Story, caplog: pytest.LogCaptureFixture) -> None:
    story.blacklist("nonsense")
    assert story.lines() == []
    old = Story(caplog, can_probe=False)
    old.blacklist(D)
    ((_, line),) = old.lines()
    assert line.endswith("requests for it are refused; it stays out until it registers again")


def test_a_probe_that_raises_is_said_once_until_its_session_is_let_in_or_forgotten(story: Story) -> None:
    told = []
    for event in (None, None, Event.RECOVERED, Event.DROPPED):
        if event:
            story.hear(event, D, outage_s=1.0, refused=0, unverified=None, idle_s=1.0)
            story.lines()
        story.log.probe_raised(D, RuntimeError("broken"))
        told.append([text for _, text in story.lines()])
    said = [f"Probing session {D} raised RuntimeError('broken') (said once); it is asked again"]
    assert told == [said, [], said, said]


def test_when_a_rack_goes_the_first_sessions_are_named_and_the_others_are_counted(story: Story) -> None:
    for session in RACK:
        story.blacklist(session)
        story.now += 0.001
    lines = story.lines()
    assert [text.split()[1] for _, text in lines] == RACK[:LINES_IN_A_SPELL]
    story.now = SPELL_S - 0.01
    story.log.sum_up()
    assert story.lines() == []
    story.now = SPELL_S
    story.log.sum_up()
    assert story.lines() == [
        ("WARNING", f"Failed-session probe: sessions blacklisted: {LEFT_OUT} more within 1.0 s, not named one by one")
    ]
    story.now += 1000
    story.log.sum_up()
    assert story.lines() == [], "counted twice"


def test_the_sum_is_said_before_the_next_line_whatever_its_kind(story: Story) -> None:
    story.blacklist(*RACK)
    story.lines()
    story.now = 60.0
    story.let_in(D)
    assert [text.split(":")[0] for _, text in story.lines()] == ["Failed-session probe", "Session decode"]


def test_kinds_are_counted_each_for_itself_and_a_new_spell_names_again(story: Story) -> None:
    story.blacklist(*RACK)
    assert len(story.lines()) == LINES_IN_A_SPELL
    story.let_in(*RACK)
    assert len(story.lines()) == LINES_IN_A_SPELL, "a recovery is hidden by what went before"
    story.now = SPELL_S
    story.blacklist(D)
    *sums, (_, line) = story.lines()
    assert [text for _, text in sums] == [
        f"Failed-session probe: sessions blacklisted: {LEFT_OUT} more within 0.0 s, not named one by one",
        f"Failed-session probe: sessions let in again: {LEFT_OUT} more within 0.0 s, not named one by one",
    ]
    assert line.startswith(f"Session {D} is blacklisted")


def test_before_a_long_silence_everything_is_said_and_nothing_twice(story: Story) -> None:
    story.blacklist(*RACK)
    story.lines()
    story.log.sum_up(at_once=True)
    assert len(story.lines()) == 1, "the number is lost until something else happens"
    story.blacklist(*RACK)
    assert story.lines() == [], "each silence in between would let a flood through"
    story.now = SPELL_S
    story.log.sum_up()
    assert [text for _, text in story.lines()] == [
        "Failed-session probe: sessions blacklisted: 1000 more within 0.0 s, not named one by one"
    ]


def test_a_flapping_rack_never_says_more_than_a_spell_allows(story: Story) -> None:
    said = 0
    for round_number in range(100):
        story.hear(Event.HELD, *RACK[:50], hold_s=1.0, relapses=round_number)
        said += len(story.lines())
        story.now += 1.0
    assert said <= (LINES_IN_A_SPELL + 1) * (100 / SPELL_S + 1)


def test_probes_that_hang_up_to_their_bound_are_said_once_until_half_have_come_back(story: Story) -> None:
    told = []
    for hung in (0, 31, 32, 33, 31, 32, 16, 32, 15, 32):
        story.log.stuck(hung, most=32)
        told += [(hung, *line) for line in story.lines()]
    text = "Failed-session probe: 32 probes hang, as many as may; peers that hang are asked in turns now"
    assert told == [(32, "WARNING", text)] * 2


def test_sessions_whose_probes_raise_are_said_once_and_again_when_they_are_not_of_the_latest(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept to say it once must not grow with what comes in from outside."""
    monkeypatch.setattr(session_watch, "SAID_LIMIT", 5)

    def raising(*sessions: str) -> list[str]:
        for session in sessions:
            story.log.probe_raised(session, RuntimeError("broken"))
        return [text.split()[2] for _, text in story.lines()]

    assert raising(*RACK[:5], *RACK[:5]) == RACK[:5]
    assert raising(RACK[0], RACK[5], RACK[0]) == [RACK[5]]
    assert raising(RACK[1]) == [RACK[1]], "silent for good"


def test_a_stream_of_malformed_ids_says_no_more_than_a_spell_allows(story: Story) -> None:
    story.hear(Event.MALFORMED, *(f"no session {number}" for number in range(1000)))
    assert len(story.lines()) == LINES_IN_A_SPELL
    story.now = SPELL_S
    story.log.sum_up()
    ((_, line),) = story.lines()
    assert line.startswith(f"Failed-session probe: session ids that are not host:port: {LEFT_OUT} more")


def test_a_loop_that_sleeps_and_wakes_all_the_time_sums_up_once_a_spell(story: Story) -> None:
    """Sessions that register again at once leave the loop without work each time."""
    for session in RACK:
        story.blacklist(session)
        story.log.sum_up(at_once=True)
        story.now += 0.001
    assert len(story.lines()) == LINES_IN_A_SPELL + 1
    story.now += SPELL_S
    story.log.sum_up()
    ((_, line),) = story.lines()
    assert f"{len(RACK) - LINES_IN_A_SPELL - 1} more" in line
