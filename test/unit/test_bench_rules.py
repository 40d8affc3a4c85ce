"""Does the bench count what it says? Its rules, rows and tables; what it measures needs real managers."""

from __future__ import annotations

import types

import pytest

from bench import fleet, scenarios, tables
from bench.fleet import Fault, FixedRank, Heard, NativeRank, OurRank, Scenario

# Importing these starts nothing, but they import what drives real managers.
from bench import lag, lost  # isort: skip
from bench.cluster import Ended  # isort: skip

STOPPED = (Fault(10.0, 40.0, "stopped"),)
DROPPED = (Fault(10.0, 40.0, "dropped"),)
REFUSED = (Fault(10.0, 40.0, "refused"),)


@pytest.mark.parametrize(
    ("faults", "asked_at", "back_at", "answered"),
    [
        (STOPPED, 5.0, 5.0 + fleet.ANSWER_S, True),
        (STOPPED, 40.0, 40.0 + fleet.ANSWER_S, True),
        (STOPPED, 20.0, 40.0 + fleet.ANSWER_S, True),  # the hanging probe is answered as the peer goes on
        ((Fault(0.0, 100.0, "stopped"),), 20.0, 80.0, False),
        (REFUSED, 20.0, 20.0 + fleet.REFUSAL_S, False),
        (DROPPED, 20.0, 25.0, False),
        (DROPPED, 39.5, 40.5 + fleet.ANSWER_S, True),  # the kernel tries again after a second
        (DROPPED, 38.0, 41.0 + fleet.ANSWER_S, True),
    ],
)
def test_a_simulated_peer_answers_when_a_real_one_would(
    faults: fleet.Faults, asked_at: float, back_at: float, answered: bool
) -> None:
    assert fleet.answer_of(faults, asked_at) == (pytest.approx(back_at), answered)


def heard_of(contender: type[fleet.Rank], faults: fleet.Faults, prefills: int = 1, decodes: int = 1) -> Heard:
    return fleet.run(contender, Scenario("a test", lambda prefill, decode: faults, 400.0), range(prefills), decodes)


@pytest.mark.parametrize("faults", [STOPPED, DROPPED, REFUSED])
def test_a_simulated_rank_of_ours_lets_a_healed_peer_in_after_it_has_settled(faults: fleet.Faults) -> None:
    (lag_s,) = heard_of(OurRank, faults).lags
    assert 1.0 <= lag_s < 6.0, "settling takes a second, and the gap is a tenth of the outage"


def test_simulated_rivals_ask_at_their_intervals() -> None:
    """A fault from second 10 to second 40, noticed in its first half second."""
    (native_s,) = heard_of(NativeRank, REFUSED).lags
    assert 0.0 <= native_s < 2.0, "asked 30 s after the failure, just after the heal"
    (native_s,) = heard_of(NativeRank, (Fault(10.0, 45.0, "refused"),)).lags
    assert 54.0 < native_s < 58.0, "asked after 30 s in vain, so 60 s later"
    fixed = heard_of(FixedRank, REFUSED, prefills=50).lags
    assert min(fixed) < 5.0
    assert 25.0 < max(fixed) <= 30.1, "each rank asks somewhere in its 30 s"


def test_hung_peers_hold_up_the_rivals_and_not_ours() -> None:
    def faults(prefill: int, decode: int) -> fleet.Faults:
        return (Fault(10.0, 390.0, "stopped"),) if decode < 4 else REFUSED

    scenario = Scenario("four hang", faults, 400.0)
    ours, fixed = (fleet.run(contender, scenario, range(1), 5).lags for contender in (OurRank, FixedRank))
    assert ours[0] < 6.0
    assert fixed[0] > 120.0


def test_time_out_counts_only_while_the_peer_is_well() -> None:
    """Away from 10 to 40 and from 50 to 60."""
    faults = (*REFUSED, Fault(50.0, 60.0, "refused"))
    assert fleet.well_s(faults, 20.0, 70.0) == 20.0
    native = heard_of(NativeRank, (Fault(10.0, 45.0, "refused"), Fault(390.0, 500.0, "refused")))
    (lag_s,) = native.lags
    assert native.kept_out_s == pytest.approx(lag_s), "the fault that is on at the end keeps nobody out who is well"
    assert native.never == 0


def test_what_several_ranks_ask_is_added_up() -> None:
    one, two = (
        fleet.run(OurRank, Scenario("", lambda *_: REFUSED, 60.0), ranks, 2) for ranks in (range(1), range(1, 3))
    )
    both = fleet.run(OurRank, Scenario("", lambda *_: REFUSED, 60.0), range(3), 2)
    one.add(two)
    assert (one.probes, sorted(one.lags), one.never) == (both.probes, sorted(both.lags), both.never)


def test_probes_are_counted_for_the_peer_that_hears_them() -> None:
    scenario = Scenario("the second fails", lambda prefill, decode: REFUSED if decode == 1 else (), 60.0)
    heard = fleet.run(OurRank, scenario, range(1), 2)
    assert not any(heard.probes_of(0)), "nobody asks a peer that is well"
    assert next(second for second, probes in enumerate(heard.probes_of(1)) if probes) == 10, "asked as it fails"


def test_the_peak_of_a_scenario_is_that_of_its_busiest_peer() -> None:
    heard = Heard(decodes=2, lasts_s=3.0)
    heard.probes[0:4] = type(heard.probes)("L", [5, 5, 5, 5])
    heard.probes[4:8] = type(heard.probes)("L", [0, 7, 0, 1])
    row = scenarios.row("a test", "ours", heard, decodes=2, prefills=1)
    assert row["peak_per_s"] == 7
    assert row["per_second"] == {1: 7, 3: 1}
    assert row["probes_each"] == 14


CELL = lag.Cell("stopped", 5, hung=8)


def trials(*seconds: float | None) -> list[lag.Trial | None]:
    return [{"ours": lag.Lag(value, lost=1)} for value in seconds]


def test_a_trial_over_its_cap_is_worse_than_all_that_are_not() -> None:
    row = lag.row(CELL, "ours", trials(3.0, None, 1.0, 2.0, None))
    assert (row["median_s"], row["worst_s"], row["over_cap"], row["lost"]) == (3.0, None, 2, 5)
    assert tables.lag_in_cell(row) == "3.00 (>122)"
    assert tables.trials_of([row]) == [3.0, 122, 1.0, 2.0, 122]


def test_a_broken_trial_is_told_and_not_counted() -> None:
    row = lag.row(CELL, "ours", [None, *trials(1.0, 2.0)])
    assert (row["trials"], row["median_s"], row["broken_trials"]) == ([1.0, 2.0], 1.5, 1)
    nothing = lag.row(CELL, "ours", [None])
    assert tables.lag_in_cell(nothing) == "-"
    assert tables.of("lag", [row]).endswith("Trials that broke and do not count: 1.")


def test_the_lag_table_has_a_line_for_each_cell_and_compares_contenders() -> None:
    rows = [lag.row(CELL, "ours", trials(1.0))]
    rows += [{**rows[0], "contender": "native 0.5.23", "trials": [20.0], "median_s": 20.0, "worst_s": 20.0}]
    text = tables.of("lag", rows)
    assert "| stopped |        5 |          8 | 1.00 (1.00) | 20.00 (20.00) |" in text
    assert "20.0 |" in text.splitlines()[-10], "native takes twenty times what ours does"


REQUESTS = {
    1: ("ours", 0, 5.0, "served", 5.1),
    2: ("ours", 0, 11.0, "lost", 11.5),
    3: ("ours", 0, 12.0, "refused", 12.1),
    4: ("ours", 0, 16.0, "refused", 16.1),
    5: ("ours", 0, 17.0, "served", 17.2),
    6: ("ours", 1, 12.0, "served", 12.1),
    7: ("native 0.5.23", 0, 17.0, "refused", 17.1),
}


def a_run() -> types.SimpleNamespace:
    """Decode 1 fails from second 10 to second 15; request 8 has not ended."""
    fault = lost.Fault(0, 10.0, 5.0, "dropped")
    sent = {room: lost.Sent(contender, decode, at) for room, (contender, decode, at, _, _) in REQUESTS.items()}
    ended = {room: Ended(how, at) for room, (_, _, _, how, at) in REQUESTS.items()}
    return types.SimpleNamespace(
        sent={**sent, 8: lost.Sent("ours", 0, 18.0)}, ended=ended, spans=[lost.Span(fault, 10.0, 15.0)], until=20.0
    )


def test_a_request_counts_under_the_fault_of_its_node_that_was_on_or_over_last() -> None:
    healthy, under, total = lost.rows_of("ours", a_run())
    assert (healthy["sent"], healthy["served"]) == (2, 2)
    assert {kind: under[kind] for kind in ("sent", "served", "refused", "lost", "unknown")} == {
        "sent": 5,
        "served": 1,
        "refused": 2,
        "lost": 1,
        "unknown": 1,
    }
    assert under["failed_after"] == 2, "one was refused after the heal, and one has not ended"
    assert under["no_service_s"] == pytest.approx(2.8), "from the last that was served to the end"
    assert (total["sent"], total["failed_after"]) == (7, 2)


def test_each_fault_of_the_script_is_over_before_the_next_of_its_node() -> None:
    for seconds in (60.0, lost.SECONDS):
        script = lost.script_of(seconds)
        for decode in (0, 1):
            mine = sorted((each for each in script if each.decode == decode), key=lambda each: each.at_s)
            ends = [each.at_s + each.lasts_s for each in mine]
            assert all(end < after.at_s for end, after in zip(ends, mine[1:], strict=False))
            assert ends[-1] < seconds


def test_a_table_keeps_numbers_right_and_tells_what_is_missing() -> None:
    lines = tables.table(["name", "n"], [["a", 1.5], ["bb", None], ["c", [1, 22]]]).splitlines()
    assert lines == [
        "| name |       n |",
        "| ---- | ------: |",
        "| a    |     1.5 |",
        "| bb   |       - |",
        "| c    | 1 to 22 |",
    ]
