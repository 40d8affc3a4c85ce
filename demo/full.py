"""What does `make demo` do? It tells the story on real SGLang servers, with the feature and without it."""

from __future__ import annotations

import os
import pathlib
import sys

from tools import environment

from . import scenario, servers, tiny_model
from .settings import SWITCH
from .show import LOGS, show
from .timeline import Timeline

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = os.environ.get("SGLANG_VERSION") or environment.SHARED_RELEASE


def set_up(folder: pathlib.Path, timeline: Timeline) -> pathlib.Path:
    """Install our wheel beside SGLang RELEASE and write a model to `folder`/model; gives the python that has both."""
    timeline.heading(f"Setting up: SGLang {RELEASE} on the CPU, and our wheel beside it")
    name = f"sglang-{RELEASE}"
    wheel = environment.built_wheel(name, CHECKOUT, folder / "wheel")
    timeline.event("wheel", f"built: {wheel.name}")
    python = environment.with_wheel(name, wheel, folder / "venv")
    timeline.event("wheel", "installed, in a virtual environment in front of the one with SGLang")
    tiny_model.write(folder / "model")
    timeline.event("model", "written: two random Llama layers")
    return python


def tell(folder: pathlib.Path, timeline: Timeline) -> tuple[scenario.Outcome, scenario.Outcome]:
    """Play the scenario twice."""
    python = set_up(folder, timeline)

    def play(feature: bool) -> scenario.Outcome:
        logs = folder / LOGS / ("with" if feature else "without")
        own = "" if feature else ", which switches SGLang's own probe off too, where it has one"
        timeline.heading(f"{'With' if feature else 'Without'} the feature: {SWITCH}={int(feature)} on prefill{own}")
        timeline.event("servers", "starting a prefill and a decode server; takes about a minute")
        with servers.running(python, RELEASE, feature, folder / "model", logs, timeline) as pair:
            timeline.event("servers", "both are ready")
            return scenario.play(pair, feature, timeline)

    return play(True), play(False)


if __name__ == "__main__":
    sys.exit(show(tell))
