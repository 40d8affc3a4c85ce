"""How is a line logged so that neither a strange text in it nor a logging filter or handler that raises does harm?"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

from sglang_failed_session_probe.own_files import CONN
from sglang_failed_session_probe.printable import printable, printable_repr


def _shown(argument: object) -> object:
    if isinstance(argument, (int, float)):
        return argument
    if isinstance(argument, dict):
        return {name: _shown(value) for name, value in argument.items()}
    if isinstance(argument, list):
        return "\n  ".join(map(printable, argument))  # indented, so that none of its lines looks like a log line
    return printable(argument) if isinstance(argument, str) else printable_repr(argument)


class HarmlessLogger:
    """A logger that raises nothing. Any thread.

    An argument that is no number is made a text: a string by ``printable``, a list of lines one below the other, and
    anything else by ``printable_repr``. A single dict fills a text with ``%(name)s``.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def log(self, level: int, text: str, *arguments: object, **options: Any) -> None:
        """Logs the line if it can be logged."""
        try:
            self._logger.log(level, text, *map(_shown, arguments), stacklevel=2, **options)
        except BaseException as fault:
            if not isinstance(fault, Exception) and threading.current_thread() is threading.main_thread():
                raise  # a Ctrl-C, or a signal handler that exits

    info = functools.partialmethod(log, logging.INFO)
    warning = functools.partialmethod(log, logging.WARNING)
    error = functools.partialmethod(log, logging.ERROR)


logger = HarmlessLogger(CONN)  # SGLang's own name: operators filter by it
