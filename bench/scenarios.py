"""Which faults of a fleet are simulated, and what comes out?"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import random
import statistics
from collections.abc import Iterator
from typing import Any

from kit.stock_manager import end_with_parent

from bench.fleet import CONTENDERS, Fault, Faults, Heard, Scenario, run
from bench.progress import say as say_of

PREFILLS = 1000
PART = 20  # prefill ranks that a process simulates at a time
OUTAGE_S = 45.0  # not where those that ask at an interval of 30 s are lucky
say = functools.partial(say_of, "fleet")


def rack_stops(prefill: int, decode: int) -> Faults:
    """Every decode rank is stopped for 45 s and goes on."""
    return (Fault(1.0, 1.0 + OUTAGE_S, "stopped"),)


def rack_restarts_network(prefill: int, decode: int) -> Faults:
    """Every decode rank refuses for 45 s: the data path is down while the hosts are up."""
    return (Fault(1.0, 1.0 + OUTAGE_S, "refused"),)


def switch_partitions(prefill: int, decode: int) -> Faults:
    """A switch parts the fleet in two halves for 45 s: packets between them are dropped."""
    return (Fault(1.0, 1.0 + OUTAGE_S, "dropped"),) if prefill % 2 != decode % 2 else ()


def rolling_restart(prefill: int, decode: int) -> Faults:
    """The decode ranks are away for 20 s, one after another, two a second."""
    return (Fault(1.0 + 0.5 * decode, 21.0 + 0.5 * decode, "refused"),)


def some_flaps(seed: int = 1) -> Faults:
    """Away for 5 to 15 s and well for as long, time and again: no rhythm that would suit an interval."""
    lengths = random.Random(seed)
    faults, now = [], 1.0
    while now < 580.0:
        faults.append(Fault(now, now + lengths.uniform(5.0, 15.0), "refused"))
        now = faults[-1].ends + lengths.uniform(5.0, 15.0)
    return tuple(faults)


FLAPS = some_flaps()


def one_flaps(prefill: int, decode: int) -> Faults:
    """One decode rank flaps for ten minutes."""
    return FLAPS


# What a decode rank hears depends on all prefill ranks, so all are simulated; and on the decode ranks that are away
# with it, not on those that were away before or will be after: of a rolling restart 120 are enough.
SCENARIOS = [
    (Scenario("all stopped for 45 s, then back at once", rack_stops, 360.0), 1000),
    (Scenario("all refuse for 45 s, then back at once", rack_restarts_network, 360.0), 1000),
    (Scenario("a switch parts the fleet for 45 s", switch_partitions, 360.0), 1000),
    (Scenario("rolling restart, 20 s each, two a second", rolling_restart, 420.0), 120),
    (Scenario("one decode rank flaps", one_flaps, 700.0), 1),
]
Case = tuple[int, str, range]  # number of a scenario, contender, prefill ranks


def simulate(case: Case) -> Heard:
    """Some prefill ranks of one scenario, in a process of its own."""
    number, contender, prefills = case
    scenario, decodes = SCENARIOS[number]
    gc.disable()  # looks in vain: there is no garbage before the end
    heard = run(CONTENDERS[contender], scenario, prefills, decodes)
    gc.collect()
    return heard


def rows(processes: int = 2, prefills: int = PREFILLS) -> Iterator[dict[str, Any]]:
    """One row for each scenario and contender."""
    with concurrent.futures.ProcessPoolExecutor(processes, initializer=end_with_parent) as pool:
        for number, (scenario, decodes) in enumerate(SCENARIOS):
            for contender in CONTENDERS:
                parts = [range(begin, min(begin + PART, prefills)) for begin in range(0, prefills, PART)]
                parts_heard = pool.map(simulate, [(number, contender, part) for part in parts])
                heard = Heard(decodes, scenario.lasts_s)
                for part, part_heard in zip(parts, parts_heard, strict=True):
                    heard.add(part_heard)
                    if part.stop == prefills or part.stop % (10 * PART) == 0:
                        so_far = f"{part.stop} of {prefills} prefill ranks"
                        say(f"[{number + 1}/{len(SCENARIOS)}] {scenario.name}: {contender}, {so_far}")
                yield row(scenario.name, contender, heard, decodes, prefills)


def row(scenario: str, contender: str, heard: Heard, decodes: int, prefills: int) -> dict[str, Any]:
    """What came out of one scenario with one contender. Probes in a second are those of the busiest decode rank."""
    lags = sorted(heard.lags)
    busiest = max((heard.probes_of(decode) for decode in range(decodes)), key=max)
    asked = [second for second, probes in enumerate(busiest) if probes]
    return {
        "scenario": scenario,
        "contender": contender,
        "peak_per_s": max(busiest),
        "probes_each": round(sum(heard.probes) / decodes),
        "let_in": len(lags),
        "never": heard.never,
        "kept_out_s": round(heard.kept_out_s / (prefills * decodes), 1),
        "lag_median_s": round(statistics.median(lags), 2) if lags else None,
        "lag_p99_s": round(lags[int(0.99 * len(lags))], 2) if lags else None,
        "lag_worst_s": round(lags[-1], 2) if lags else None,
        "last_s": round(heard.last_s, 1),
        "lags": [round(lag, 3) for lag in lags[:: max(1, len(lags) // 200)]],
        "per_second": {second: busiest[second] for second in asked},
    }


if __name__ == "__main__":
    for result in rows():
        print({name: value for name, value in result.items() if name not in ("lags", "per_second")}, flush=True)
