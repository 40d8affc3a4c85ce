"""What does `make demo-router` do? Streaming clients behind the stock router, with the patch and without it, at once.

Two prefill nodes, one with the patch, share two decode nodes; before each of them is a router of its own, which two
requests a second go to. One decode node is cut off for a while. With --quick all of it is shorter.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable

from demo import full, servers
from demo.settings import SWITCH
from demo.show import LOGS, show
from demo.timeline import Timeline
from tools import environment

from . import trial
from .cut import own_network
from .grid import DECODES, NEW, Cell, Trial
from .tally import Tally

OVER_S = 3.0
WITH = Cell("defaults", decodes=2, streaming=True)
WITHOUT = dataclasses.replace(WITH, patch=False)
RECOVERED = r"Session .* recovered via probe.*"
REFUSED = r"remote mooncake session (\S+) is not alive"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the clients of one of the routers have seen, and the session that the log of its prefill node names."""

    log: pathlib.Path
    patch: bool
    watch_s: float
    tally: Tally
    session: str

    def problems(self) -> list[str]:
        """What the story wants and what was not seen."""
        wanted = {"some requests fail": self.tally.failed > 0, "prefill refuses a session": bool(self.session)}
        if self.patch:
            soon = self.tally.over and (self.tally.last_failure_s or 0.0) <= OVER_S
            wanted[f"nobody fails later than {OVER_S:.0f} s after the heal"] = soon
        else:
            wanted[f"requests fail to the end, {self.watch_s:.0f} s after the heal"] = not self.tally.over
        return [f"not seen: {what}" for what, seen in wanted.items() if not seen]

    def cells(self) -> dict[str, str]:
        """What the closing table says of it, by label."""
        seen = self.tally
        last = "nobody" if seen.last_failure_s is None else f"{seen.last_failure_s:.1f} s"
        return {
            "refused session": self.session or "none",
            "streaming requests": str(seen.requests),
            "failed": f"{seen.failed} ({seen.failed / seen.requests:.0%})",
            "failed after the heal": str(seen.failed_after_heal),
            "last failure after the heal": last if seen.over else f"still failing after {self.watch_s:.0f} s",
            f"{DECODES[0]} serves again": "never" if seen.again_s is None else f"{seen.again_s:.1f} s after the heal",
        }


def tell(quick: bool) -> Callable[[pathlib.Path, Timeline], tuple[Outcome, Outcome]]:
    """The story, for `show`."""
    fault = Trial(5.0, 12.0, (WITH, WITHOUT)) if quick else Trial(9.0, 40.0, (WITH, WITHOUT))

    def told(folder: pathlib.Path, timeline: Timeline) -> tuple[Outcome, Outcome]:
        python = full.set_up(folder, timeline)
        router = environment.python(f"router-{NEW}")
        timeline.event("router", f"sglang-router {NEW} is installed, in an environment of its own")
        own_network()
        timeline.heading(f"Two prefill nodes, {SWITCH}=1 and 0, two decode nodes, a router before each prefill node")
        timeline.event("servers", "starting four servers; takes about two minutes")
        names = {"prefill-with": True, "prefill-without": False}
        logs = folder / LOGS
        with servers.fleet(python, full.RELEASE, names, DECODES, folder / "model", logs, timeline) as fleet:
            timeline.event("servers", "all are ready")
            timeline.heading("Two streaming requests a second through each router, and a fault of one decode node")
            prefills = dict(zip(fault.cells, (fleet[name] for name in names), strict=True))
            seen = trial.play(fault, prefills, fleet, lambda _: router, logs, timeline)
        on, off = (outcome(each, prefills[each.cell].process.log) for each in seen)
        for line in re.findall(RECOVERED, on.log.read_text(errors="replace")):
            timeline.event("prefill", line)
        return on, off

    return told


def outcome(seen: trial.Seen, log: pathlib.Path) -> Outcome:
    """What is told of a cell, with the log of its prefill node."""
    return Outcome(log, seen.cell.patch, seen.watch_s, seen.tally, refused_session(log.read_text(errors="replace")))


def refused_session(log: str) -> str:
    """The session that a prefill node's log says is refused; empty if there is none."""
    found = re.search(REFUSED, log)
    return found[1] if found else ""


if __name__ == "__main__":
    sys.exit(show(tell(quick="--quick" in sys.argv[1:])))
