"""What do clients lose behind the stock router, with which of its flags? Plays the grid and keeps what was seen.

    python -m router FILE              the grid; appends one JSON object for each cell to FILE
    python -m router --round=2 FILE    one round of it alone
    python -m router --quick FILE      a few cells of it

tools/router_table.py makes the tables of docs/router.md from FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from demo import full, servers
from demo.processes import Failure, interrupt_on_termination, last_lines
from demo.timeline import Timeline
from tools import environment

from . import grid, trial
from .cut import own_network


def main(arguments: list[str]) -> int:
    """Play what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--round", type=int, choices=range(1, len(grid.ROUNDS) + 1))
    parser.add_argument("file", type=pathlib.Path)
    asked = parser.parse_args(arguments)
    rounds = grid.QUICK if asked.quick else grid.ROUNDS[asked.round - 1 : asked.round] if asked.round else grid.ROUNDS
    interrupt_on_termination()
    timeline = Timeline()
    with tempfile.TemporaryDirectory(prefix="failed-session-probe-router-") as folder:
        try:
            play(rounds, asked.file, pathlib.Path(folder), timeline)
        except Failure as failure:
            timeline.note(f"{failure}\n{last_lines(failure.log) if failure.log else ''}")
            return 1
        except environment.CannotMake as error:
            timeline.note(str(error))
            return 1
        except KeyboardInterrupt:
            timeline.note("interrupted; nothing is left running")
            return 130
    return 0


def play(rounds: Sequence[Sequence[grid.Trial]], file: pathlib.Path, folder: pathlib.Path, timeline: Timeline) -> None:
    """Play each round on servers of its own, and append a line to `file` for each cell."""
    python = full.set_up(folder, timeline)
    versions = {cell.version for trials in rounds for each in trials for cell in each.cells}
    routers = {version: environment.python(f"router-{version}") for version in versions}
    own_network()
    for number, trials in enumerate(rounds, 1):
        timeline.heading(f"Round {number} of {len(rounds)}: {len(trials)} faults, on servers of their own")
        prefills = grid.prefills(trials)
        logs = folder / f"logs-{number}"
        with servers.fleet(python, full.RELEASE, prefills, grid.DECODES, folder / "model", logs, timeline) as fleet:
            timeline.event("servers", f"{', '.join(fleet)} are ready")
            for each in trials:
                behind = {cell: fleet[name] for cell, name in grid.placed(each).items()}
                for seen in trial.play(each, behind, fleet, routers.__getitem__, logs, timeline):
                    with open(file, "a") as lines:
                        print(json.dumps(dataclasses.asdict(seen)), file=lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
