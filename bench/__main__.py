"""Runs the cases of the bench, prints their tables, keeps their rows and draws their plots.

    python -m bench [--quick] [lag | lost | hot-path | chunks | watching | fleet ...]      all of them if none is named

With --quick everything is small and proves nothing but that the bench runs; its results go to bench/results/quick/.
Each case is a process of its own. Those that wait most of the time run side by side: the simulation of a fleet beside
the lags, with what they leave of the processor, and the cost of watching, which is counted in CPU time, beside the
lost requests. The rows go to bench/results/CASE.json, the plots to docs/plots/.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Optional

import environment
from kit import processes

from bench import CHECKOUT, contenders, tables
from bench.progress import say

RESULTS = CHECKOUT / "bench" / "results"
PLOTS = CHECKOUT / "docs" / "plots"
STAGES = [["hot-path"], ["chunks"], ["lag", "fleet"], ["lost", "watching"]]
NEED_SGLANG = {"chunks", "lag", "lost", "watching"}
CASES = [case for stage in STAGES for case in stage]
DEADLINE_S = 1500.0  # of a stage
END_DEADLINE_S = 20.0
IN_THIS_PROCESS = "--in-this-process"
QUICK = "--quick"


def rows_of(case: str, quick: bool) -> Iterable[tables.Row]:
    """Runs a case."""
    if case == "hot-path":
        from bench import hot_path

        return hot_path.rows()
    if case == "chunks":
        from bench import chunks

        return chunks.rows(rounds=3) if quick else chunks.rows()
    if case == "lag":
        from bench import lag

        return lag.rows(lag.QUICK_CELLS, clusters=3, trials=1) if quick else lag.rows()
    if case == "lost":
        from bench import lost

        return lost.rows(seconds=60.0) if quick else lost.rows()
    if case == "watching":
        from bench import watching

        return watching.rows(seconds=5.0) if quick else watching.rows()
    from bench import scenarios

    return scenarios.rows(prefills=40) if quick else scenarios.rows()


def results(quick: bool) -> pathlib.Path:
    """Where the rows go."""
    return RESULTS / "quick" if quick else RESULTS


def processor_time() -> tuple[int, int]:
    """What passed on all processors since the start of this machine, and what of it its host gave to others."""
    times = [int(word) for word in pathlib.Path("/proc/stat").read_text().split()[1:9]]
    return sum(times), times[7]


def measure(case: str, quick: bool) -> None:
    """Runs a case in this process and keeps its rows."""
    if case == "fleet":
        os.nice(19)  # it may run beside measurements of time
    began, before = time.monotonic(), processor_time()
    rows = list(rows_of(case, quick))
    passed, stolen = (now - then for now, then in zip(processor_time(), before, strict=True))
    about = {
        "case": case,
        "at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seconds": round(time.monotonic() - began),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "stolen_percent": round(100 * stolen / passed, 1),
        "kernel": platform.release(),
    }
    folder = results(quick)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    new = folder / f"{case}.json.new"
    new.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')
    new.rename(folder / f"{case}.json")
    say(case, f"over: {len(rows)} rows")


def run(stage: list[str], quick: bool) -> list[str]:
    """Runs cases side by side to their end; gives those that failed."""
    command = [sys.executable, "-m", "bench", IN_THIS_PROCESS, *([QUICK] if quick else [])]
    running = {case: processes.start([*command, case], cwd=CHECKOUT) for case in stage}
    deadline = time.monotonic() + DEADLINE_S
    try:
        return [case for case, process in running.items() if ended_with(process, deadline) != 0]
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)  # it ends what it has started; nothing happens if it is over
        for process in running.values():
            ended_with(process, time.monotonic() + END_DEADLINE_S)
            process.kill()


def ended_with(process: subprocess.Popen[str], deadline: float) -> Optional[int]:
    """Waits for the end of a process and gives its exit status, None if it goes on at the deadline."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def show(case: str, quick: bool) -> None:
    """Prints the tables of a case and draws its plots, from the rows that were kept."""
    result = json.loads((results(quick) / f"{case}.json").read_text())
    print(f"\n## {case}\n\n{tables.of(case, result['rows'])}\n")
    print(f"Measured in {result['seconds']} s, {result['at']}.")
    if result.get("stolen_percent", 0) >= 1:
        print(f"The host of this machine gave {result['stolen_percent']} % of its processors to others meanwhile.")
    try:
        from bench import plots
    except ImportError as error:
        say(case, f"no plots: {error}")
        return
    for path in plots.draw(case, result["rows"], results(quick) if quick else PLOTS):
        print(f"![{case}]({path.relative_to(CHECKOUT)})", flush=True)


def main(arguments: list[str]) -> int:
    """Runs the cases that are named, all if none is; 1 if one failed, 2 if there is none of that name."""
    options, cases = ({word for word in arguments if is_option(word) is wanted} for wanted in (True, False))
    quick = QUICK in options
    if unknown := cases - set(CASES) | options - {QUICK, IN_THIS_PROCESS}:
        print(f"there is no {', '.join(sorted(unknown))}: say {QUICK}, {', '.join(CASES)}", file=sys.stderr)
        return 2
    if IN_THIS_PROCESS in options:
        (case,) = cases
        measure(case, quick)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = [case for case in CASES if not cases or case in cases]
    if not NEED_SGLANG.isdisjoint(wanted):
        make_environments()
    failed: list[str] = []
    for stage in STAGES:
        failed += run([case for case in stage if case in wanted], quick)
    for case in wanted:
        if case not in failed:
            show(case, quick)
    for case in failed:
        print(f"{case} has failed", file=sys.stderr)
    return bool(failed)


def make_environments() -> None:
    """Makes the environments with SGLang that are not there yet, so that this takes no time of a case."""
    for name in (contenders.STOCK, contenders.FIXED):
        environment.python(name)


def is_option(word: str) -> bool:
    return word.startswith("--")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except environment.CannotMake as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
