"""How does a demo begin and end, whatever happens in between?"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import traceback
from collections.abc import Callable
from typing import Protocol

from tools.environment import CannotMake

from .processes import Failure, interrupt_on_termination, last_lines
from .timeline import Timeline

LOGS = "logs"


class Told(Protocol):
    """What was seen of one telling of the story."""

    @property
    def log(self) -> pathlib.Path:
        """The file whose end may say why it was not as it should be."""

    def problems(self) -> list[str]:
        """What the story wants and what was not seen."""

    def cells(self) -> dict[str, str]:
        """What the closing table says of it, by label."""


def show(tell: Callable[[pathlib.Path, Timeline], tuple[Told, Told]]) -> int:
    """Run a demo and return its exit status: 0 only if all of the story was seen, 130 after Ctrl-C.

    `tell(folder, timeline)` gives the outcomes with and without the feature; it may use `folder`, keeps logs in the
    folder LOGS there, and raises Failure or CannotMake. After a failure the logs stay.
    """
    interrupt_on_termination()
    timeline = Timeline()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="failed-session-probe-demo-"))
    try:
        on, off = tell(folder, timeline)
        timeline.table(on.cells(), off.cells())
        problems = [*(f"with: {p}" for p in on.problems()), *(f"without: {p}" for p in off.problems())]
        log: pathlib.Path | None = (on if on.problems() else off).log
    except Failure as failure:
        problems, log = [str(failure)], failure.log
    except CannotMake as error:
        problems, log = [str(error)], None
    except KeyboardInterrupt:
        timeline.note("interrupted; nothing is left running")
        shutil.rmtree(folder)
        return 130
    except Exception:
        problems, log = [traceback.format_exc()], None
    if problems and log:
        timeline.note(f"the end of {log}:\n{last_lines(log)}")
    timeline.verdict(problems)
    _clear(folder, keep_logs=bool(problems))
    if folder.exists():
        timeline.note(f"The logs are in {folder}")
    return 1 if problems else 0


def _clear(folder: pathlib.Path, keep_logs: bool) -> None:
    for entry in folder.iterdir():
        if not keep_logs or entry.name != LOGS:
            shutil.rmtree(entry)
    if not any(folder.iterdir()):
        folder.rmdir()
