"""Are calls made side by side, on few threads, and does each come back? On jobs that are Python functions."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit.fake_engine import raises
from kit.managers import threads
from kit.waiting import wait_until
from sglang.srt.disaggregation.mooncake import probe_workers
from sglang.srt.disaggregation.mooncake.probe_schedule import Call
from sglang.srt.disaggregation.mooncake.probe_workers import Answer, Workers

NAME = "crew"


class Crew:
    """Workers that are given calls, number by number, and what comes back. What a call does, a test says."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.does: Callable[[int], Any] = lambda number: 0
        self.threads: set[int] = set()
        self.workers = Workers(NAME, self._make, self.answers)

    def start(self, number: int) -> list[Call]:
        calls = [Call(f"decode:{one + 1}", generation=one, made_at=0.0) for one in range(number)]
        self.workers.start(calls)
        return calls

    def answered(self, number: int) -> list[Answer]:
        return [self.answers.get(timeout=10) for _ in range(number)]

    def numbers(self, number: int) -> set[int]:
        return {answer.call.generation for answer in self.answered(number)}

    def _make(self, call: Call) -> Answer:
        self.threads.add(threading.get_ident())
        return Answer(call, self.does(call.generation))


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.workers.close()
    assert wait_until(lambda: not threads(NAME)), "each role switch leaks threads"


def test_calls_that_return_at_once_are_made_by_one_thread_and_have_all_come_back_then(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "MOST_RETURN_WITHIN_S", 10.0)
    began = time.monotonic()
    for _ in range(2):
        crew.start(16)
        assert crew.answers.qsize() == 16, "the loop wakes for each answer, which costs more than the probe"
        crew.answered(16)
    assert len(crew.threads) == 1, "a thread wakes for each probe, which costs as much as the probe"
    assert time.monotonic() - began < 5.0, "answers that have come are left lying"


@pytest.mark.parametrize("hung", [{0}, {3}, {0, 1, 15}, set(range(15))], ids=str)
def test_calls_that_hang_hold_up_none_that_were_started_with_them(crew: Crew, hung: set[int]) -> None:
    goes_on = threading.Event()
    crew.does = lambda number: goes_on.wait(30) if number in hung else 0
    crew.start(16)
    well = set(range(16)) - hung
    came = crew.numbers(len(well))
    goes_on.set()
    assert came == well, "a peer that is well is not asked for a minute"
    assert crew.numbers(len(hung)) == hung


def test_what_a_call_gives_comes_back_with_it(crew: Crew) -> None:
    crew.does = lambda number: 10 * number
    calls = crew.start(3)
    assert {id(answer.call): answer.rc for answer in crew.answered(3)} == {
        id(call): 10 * call.generation for call in calls
    }


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_call_that_raises_comes_back_with_what_it_raised_and_the_next_is_made(
    error: BaseException, crew: Crew
) -> None:
    crew.does = lambda number: raises(error)() if number == 0 else 0
    crew.start(4)
    found = {answer.call.generation: (answer.rc, answer.error) for answer in crew.answered(4)}
    assert found == {0: (None, error), 1: (0, None), 2: (0, None), 3: (0, None)}


def test_a_call_comes_back_if_there_is_no_memory_for_it_nor_for_saying_so(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MemoryError()

    def fail(_: int) -> None:
        monkeypatch.setattr(probe_workers, "Answer", raises(error))
        raise error

    crew.does = fail
    crew.start(1)
    (answer,) = crew.answered(1)
    assert answer.error is error


def test_a_call_tells_the_thread_that_is_in_the_engine_for_it_for_as_long_as_it_is(crew: Crew) -> None:
    """That is the thread whose wait is ended if the call hangs."""
    goes_on, inside = threading.Event(), queue.SimpleQueue[int]()

    def hangs(number: int) -> int:
        inside.put(threading.get_native_id())
        goes_on.wait(30)
        return 0

    crew.does = hangs
    (call,) = crew.start(1)
    assert inside.get(timeout=10) == call.thread != 0
    goes_on.set()
    crew.answered(1)
    assert call.thread == 0, "the next call of the thread would be ended in place of this one"


def test_idle_threads_serve_the_next_calls_and_are_ended_when_they_are_not_wanted(crew: Crew) -> None:
    goes_on = threading.Event()
    crew.does = lambda number: goes_on.wait(30)
    crew.start(8)
    assert wait_until(lambda: len(threads(NAME)) == 8)
    goes_on.set()
    crew.answered(8)
    crew.start(8)
    crew.answered(8)
    assert len(threads(NAME)) == 8, "threads that were there are not used"
    crew.workers.release_idle(keep=3)
    assert wait_until(lambda: len(threads(NAME)) == 3)
    crew.start(5)
    assert crew.numbers(5) == set(range(5))
    crew.workers.release_idle()
    assert wait_until(lambda: not threads(NAME)), "threads wait though nothing is blacklisted"
    crew.start(2)
    assert crew.numbers(2) == {0, 1}


def test_nothing_is_kept_of_threads_that_have_ended(crew: Crew) -> None:
    for _ in range(300):
        crew.start(1)
        crew.answered(1)
        crew.workers.release_idle()
        crew.start(1)  # on a thread that is made before the one released has ended
        crew.answered(1)
        crew.workers.release_idle()
    assert wait_until(lambda: not threads(NAME))
    assert not crew.workers._threads


def test_threads_that_hang_end_when_they_come_back_after_the_close(crew: Crew) -> None:
    goes_on = threading.Event()
    crew.does = lambda number: goes_on.wait(30)
    crew.start(4)
    crew.workers.close()
    time.sleep(0.05)
    assert len(threads(NAME)) == 4
    goes_on.set()
    assert wait_until(lambda: not threads(NAME))


@pytest.mark.parametrize("method", ["__init__", "start"])
def test_where_no_thread_can_be_had_each_call_comes_back_with_the_reason(
    method: str, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as at_its_limit:
        no_thread = raises(RuntimeError("can't start new thread"))
        at_its_limit.setattr(threading.Thread, method, lambda *_, **__: no_thread())
        crew.start(16)
    came = crew.answered(16)
    assert {answer.call.generation for answer in came} == set(range(16)), "a session is never asked again"
    assert all("can't start new thread" in repr(answer.error) for answer in came)
    crew.start(2)
    assert crew.numbers(2) == {0, 1}
