"""How is a line logged so that a logging filter or handler that raises stops nothing of SGLang's or ours?"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any


class HarmlessLogger:
    """Logs under a name, and raises nothing. Any thread."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def log(self, level: int, text: str, *arguments: object, **options: Any) -> None:
        """Logs the line if it can be logged."""
        try:
            self._logger.log(level, text, *arguments, stacklevel=2, **options)
        except BaseException as fault:
            if not isinstance(fault, Exception) and threading.current_thread() is threading.main_thread():
                raise  # a Ctrl-C, or a signal handler that exits

    info = functools.partialmethod(log, logging.INFO)
    warning = functools.partialmethod(log, logging.WARNING)
    error = functools.partialmethod(log, logging.ERROR)


logger = HarmlessLogger("sglang.srt.disaggregation.mooncake.conn")  # SGLang's own name: operators filter by it
