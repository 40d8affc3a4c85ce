"""sglang-failed-session-probe: which commands does an operator have, and how does each of them end?"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, Optional

PROGRAM = "sglang-failed-session-probe"


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments, and what is allowed, in one line."""

    def parse_known_args(  # type: ignore[override]  # so that a subcommand names its own unknown arguments
        self, args: Optional[Sequence[str]] = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        if not line.startswith("argument "):  # such a message says what is allowed
            line += f" ({' '.join(self.format_usage().split())})"
        self.exit(2, f"{self.prog}: {line}\n")


def main() -> NoReturn:
    """Runs the command that the arguments name and ends the process."""
    _open_streams()
    try:
        status = _run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{PROGRAM}: a fault of its own: {error!r} at {place.filename}:{place.lineno}", file=sys.stderr)
        status = 1
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # A thread that returns from Mooncake into an interpreter that shuts down would abort the process.
    os._exit(status)


def _open_streams() -> None:
    """Makes standard output and errors take any text; where they are closed it is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 until the process ends
        else:
            stream.reconfigure(errors="backslashreplace")


def _run() -> int:
    try:
        arguments = _parser().parse_args()
    except SystemExit as end:
        return int(end.code or 0)
    return int(arguments.run(arguments))


def _parser() -> _Parser:
    from sglang_failed_session_probe import doctor, probe, sessions, status

    parser = _Parser(PROGRAM, description="What heals blacklisted Mooncake sessions in SGLang: is it well?")
    version = doctor.version_of(PROGRAM) or "of unknown version (a checkout, or broken)"
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    commands = parser.add_subparsers(required=True, metavar="doctor|probe|sessions|status")
    for name, module, question in (
        ("doctor", doctor, "does the patch fit this machine's SGLang and Mooncake?"),
        ("probe", probe, "does a decode node answer from this machine?"),
        ("sessions", sessions, "which sessions do this node's prefill schedulers refuse, and why?"),
        ("status", status, "what do the metrics of the prefill nodes say?"),
    ):
        command = commands.add_parser(name, help=question, description=question[0].upper() + question[1:])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    main()
