"""What does an operator see who mistypes a command, asks for its version or interrupts it?"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from command import run, started
from kit.paths import PYTHON_FOLDER
from kit.releases import environment, wheel  # noqa: F401

WRONG = {
    "": "doctor|probe|sessions|status",
    "heal": "choose from",
    "--count 2": "doctor|probe|sessions|status",
    "probe": "HOST:PORT",
    "probe 10.0.3.7": "10.0.3.7:15412",
    "probe 10.0.3.7:0": "from 1 to 65535",
    "probe 10.0.3.7:65536": "from 1 to 65535",
    "probe fd00::7:15412": "[fd00::7]:15412",
    "probe 10.0.3.7:1 10.0.3.8:1": "unrecognized arguments: 10.0.3.8:1",
    "probe 10.0.3.7:1 --count": "expected one argument",
    "probe 10.0.3.7:1 --count 0": "greater than 0",
    "probe 10.0.3.7:1 --count many": "greater than 0",
    "probe 10.0.3.7:1 --verify aux": "0x and hexadecimal digits",
    "probe 10.0.3.7:1 --verify 0x10000000000000000": "0x and hexadecimal digits",
    "probe 10.0.3.7:1 --protocol ucx": "choose from",
    "probe 10.0.3.7:1 --json": "usage: sglang-failed-session-probe probe",
    "status --url prefill:30000": "http://prefill:30000",
    "status --url http://prefill:port": "http://prefill:30000",
    "status --watch 0": "from 1 to 86400",
    "status --watch nan": "from 1 to 86400",
    "sessions --watch 0": "from 1 to 86400",
    "sessions decode:7001": "usage: sglang-failed-session-probe sessions",
    "status prefill:30000": "usage: sglang-failed-session-probe status",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_gets_one_line_that_says_what_is_right(arguments: str) -> None:
    status, output, errors = run(*arguments.split())
    assert (status, output) == (2, ""), f"wrong usage must be exit status 2: {errors}"
    (line,) = errors.splitlines()
    assert line.startswith("sglang-failed-session-probe")
    assert WRONG[arguments] in line


def test_the_wheel_brings_the_command_and_it_knows_its_version(
    wheel: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    python = environment.with_wheel("engines", wheel, tmp_path / "venv")
    command = python.with_name("sglang-failed-session-probe")
    version = subprocess.run([command, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    assert version == f"sglang-failed-session-probe {wheel.name.split('-')[1]}\n"
    from_wheel = subprocess.run([command, "probe", "127.0.0.1:1"], capture_output=True, text=True, timeout=30)
    assert "nothing listens" in from_wheel.stdout, f"the command does not find its own files: {from_wheel.stderr}"


def test_the_door_at_interpreter_start_imports_nothing_of_the_command() -> None:
    code = "import sglang_failed_session_probe, sys; print('argparse' in sys.modules, 'json' in sys.modules)"
    assert run(what=("-S", "-c", code)) == (0, "False False\n", "")


@pytest.mark.parametrize("arguments", ["--version 2>&-", "--help 2>&-", "sessions --json 2>&-", "doctor --json >&-"])
def test_a_closed_stream_is_no_fault(arguments: str) -> None:
    """As in a job that wants only the exit status."""
    command = f"'{sys.executable}' -m sglang_failed_session_probe {arguments}"
    env = {**os.environ, "PYTHONPATH": str(PYTHON_FOLDER)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    assert "fault of its own" not in done.stdout + done.stderr
    assert done.returncode == 0 or not arguments.startswith("--")


def test_a_fault_of_the_commands_own_is_one_line_and_no_traceback() -> None:
    code = "from sglang_failed_session_probe import __main__, status; status.run = lambda _: 1 / 0; __main__.main()"
    status, output, errors = run("status", what=("-c", code))
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert "ZeroDivisionError" in line


def test_a_reader_that_hangs_up_hears_no_complaint() -> None:
    with started("probe", "127.0.0.1:1", "--count", "100") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "no answer" in process.stdout.readline()
        process.stdout.close()
        status = process.wait(10)
        assert process.stderr.read() == "", "`| head -1` ended in a complaint"
    assert status == 128 + signal.SIGPIPE


def test_help_goes_to_stdout() -> None:
    for command in ((), ("doctor",), ("probe",), ("sessions",), ("status",)):
        status, output, errors = run(*command, "--help")
        assert (status, errors) == (0, "")
        assert "usage: sglang-failed-session-probe" in output
