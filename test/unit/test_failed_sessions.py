"""Is the blacklist a set as SGLang knows it, and does its listener hear of each change?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.disaggregation.mooncake.failed_sessions import FailedSessions
from sglang.srt.disaggregation.mooncake.session_watch import Event
from virtual_prober import HEALTHY, REFUSING, Clock, VirtualProber, many

D = "decode:7001"
OTHER = "other:7002"
SESSIONS = many("decode", 5)


class Notes:
    """A listener that writes down what it hears, and raises each time if it is ``broken``."""

    def __init__(self, known: Iterable[Any] = (), broken: bool = False) -> None:
        self.known = set(known)
        self.broken = broken
        self.heard: list[Any] = []

    def failed(self, session: Any) -> None:
        self._hear("failed", session)

    def left(self, session: Any) -> None:
        self._hear("left", session)

    def cleared(self) -> None:
        self._hear("cleared")

    def requested(self, session: Any) -> None:
        self._hear("requested", session)

    def fault(self, session: Any, error: str) -> None:
        self.heard.append(("fault", session, error.splitlines()[-1]))

    def _hear(self, *what: Any) -> None:
        self.heard.append(what)
        if self.broken:
            raise RuntimeError("a fault of our own")


# What SGLang and its forks call.


def change(blacklist: set[Any], way: str, some: list[Any]) -> Any:
    """Changes a set in one of the ways SGLang or a fork of it may."""
    if way == "|=":
        blacklist |= set(some)
    elif way == "-=":
        blacklist -= set(some)
    elif way == "&=":
        blacklist &= set(some)
    elif way == "^=":
        blacklist ^= set(some)
    elif way in ("update", "difference_update", "intersection_update"):
        getattr(blacklist, way)(some[:1], set(some[1:]))
    elif way == "clear":
        blacklist.clear()
    elif way == "symmetric_difference_update":
        blacklist.symmetric_difference_update(iter(some))
    elif some:
        return getattr(blacklist, way)(some[0])
    return None


@given(
    adopted=st.sets(st.sampled_from(SESSIONS)),
    changes=st.lists(
        st.tuples(
            st.sampled_from(["add", "discard", "remove", "__contains__", "clear", "update", "difference_update"])
            | st.sampled_from(["|=", "-=", "&=", "^=", "pop", "intersection_update", "symmetric_difference_update"]),
            st.lists(st.sampled_from(SESSIONS), max_size=3),
        )
    ),
)
def test_the_blacklist_is_a_set_and_exactly_what_is_in_it_is_probed(
    adopted: set[str], changes: list[tuple[str, list[str]]]
) -> None:
    prober, plain = VirtualProber(*adopted), set(adopted)
    for session in SESSIONS:
        prober.becomes(session, REFUSING)
    for way, some in changes:
        if way == "pop":
            if plain:
                plain.remove(prober.sessions.pop())
        elif way == "remove" and some and some[0] not in plain:
            with pytest.raises(KeyError):
                change(prober.sessions, way, some)
        else:
            assert change(prober.sessions, way, some) == change(plain, way, some)
        assert prober.sessions == plain
        assert (len(prober.sessions), bool(prober.sessions)) == (len(plain), bool(plain))
        assert sorted(prober.sessions) == sorted(plain)
    prober.run(0.1)
    assert {entry.session for entry in prober.seen("probe")} == plain


def test_the_listener_hears_of_each_change_in_order() -> None:
    notes = Notes()
    sessions = FailedSessions(notes)
    sessions.add(D)
    sessions.add(D)
    sessions.discard(D)
    sessions.add(OTHER)
    sessions.remove(OTHER)
    sessions.clear()
    assert notes.heard == [
        *[("failed", D), ("failed", D), ("left", D)],
        *[("failed", OTHER), ("left", OTHER), ("cleared",)],
    ], "a failure or a registration that nobody hears of"


def test_the_listener_hears_of_a_change_when_the_set_itself_has_changed() -> None:
    seen: list[set[Any]] = []

    class Looks(Notes):
        def _hear(self, *what: Any) -> None:
            seen.append(set(sessions))

    sessions = FailedSessions(Looks())
    sessions.add(D)
    sessions.discard(D)
    assert seen == [{D}, set()]


def test_the_listener_hears_of_requests_for_the_sessions_that_it_knows_alone() -> None:
    """``in`` runs for every chunk of every healthy session."""
    notes = Notes(known=[D])
    sessions = FailedSessions(notes)
    assert D not in sessions, "on probation: it is known, and not blacklisted"
    assert OTHER not in sessions
    assert notes.heard == [("requested", D)]


def test_what_the_listener_itself_takes_off_is_not_told_to_it() -> None:
    notes = Notes()
    sessions = FailedSessions(notes)
    sessions.add(D)
    sessions.take_off(D)
    sessions.take_off(D)
    assert sessions == set()
    assert notes.heard == [("failed", D)], "a recovery is taken for a registration"


def test_remove_of_what_is_not_blacklisted_raises_and_is_not_told() -> None:
    notes = Notes()
    with pytest.raises(KeyError):
        FailedSessions(notes).remove(D)
    assert notes.heard == []


def test_pop_of_an_empty_blacklist_raises_as_a_set_does() -> None:
    with pytest.raises(KeyError):
        VirtualProber().sessions.pop()


def test_the_swap_in_place_operators_give_the_same_object() -> None:
    prober = VirtualProber()
    same = sessions = prober.sessions
    sessions |= {D}
    sessions -= {OTHER}
    sessions &= {D, OTHER}
    sessions ^= {OTHER}
    assert sessions is same
    assert same == {D, OTHER}


# Copies.


@pytest.mark.parametrize(
    "copied",
    [
        set,
        copy.copy,
        copy.deepcopy,
        lambda some: some.copy(),
        lambda some: some | {OTHER},
        lambda some: some.union([OTHER]),
        lambda some: some & {D},
        lambda some: some - {OTHER},
        lambda some: some ^ {OTHER},
        lambda some: {OTHER} | some,
        lambda some: pickle.loads(pickle.dumps(some)),
    ],
)
def test_a_copy_is_a_set_that_nobody_listens_to(copied: Callable[[Any], set[Any]]) -> None:
    prober = VirtualProber(D)
    prober.becomes(D, REFUSING)
    its_copy = copied(prober.sessions)
    assert D in its_copy
    its_copy.discard(D)
    its_copy.add("not:1")
    prober.run(0.1)
    assert [entry.session for entry in prober.seen("probe")] == [D]
    assert prober.sessions == {D}


# Faults of the listener.


def test_a_listener_that_raises_leaves_sglang_with_a_plain_set() -> None:
    notes = Notes(known=[D], broken=True)
    sessions = FailedSessions(notes)
    sessions.add(D)
    assert D in sessions
    sessions |= {OTHER}
    sessions.discard(D)
    assert D not in sessions
    sessions.remove(OTHER)
    assert sessions == set()
    faults = [what for what in notes.heard if what[0] == "fault"]
    assert len(faults) == 6
    assert set(faults) == {("fault", session, "RuntimeError: a fault of our own") for session in (D, OTHER)}


def test_a_listener_that_raises_when_all_are_taken_off_or_when_a_fault_is_told_harms_nobody() -> None:
    class Worse(Notes):
        def fault(self, session: Any, error: str) -> None:
            raise MemoryError

    for notes in (Notes(broken=True), Worse(broken=True)):
        sessions = FailedSessions(notes)
        sessions.add(D)
        sessions.clear()
        assert sessions == set()


def broken_clock(clock: Clock) -> float:
    raise RuntimeError("a fault of our own")


def test_a_fault_of_ours_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = VirtualProber(OTHER)
    monkeypatch.setattr(Clock, "__call__", broken_clock)
    for _ in range(3):
        prober.sessions.add(D)
        assert D in prober.sessions
        assert OTHER in prober.sessions
        prober.sessions.discard(D)
        assert D not in prober.sessions
    assert prober.sessions == {OTHER}
    faults = prober.seen(Event.FAULT)
    assert len(faults) == 1
    assert "RuntimeError: a fault of our own" in faults[0].detail["traceback"]


def test_after_a_fault_of_ours_the_daemon_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = VirtualProber()
    with monkeypatch.context() as fault:
        fault.setattr(Clock, "__call__", broken_clock)
        prober.sessions.add("unheard:1")
    prober.run(10)
    prober.fail(D, peer=HEALTHY)
    prober.run(1.1)
    assert prober.let_in(D), "one fault of ours, and nobody is healed any more"
