"""In which environments is the doctor asked? Makes small ones of our wheel and of links to what else is to be there."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import venv
import zipfile
from typing import Any

from kit.releases import environment
from kit.stock_node import clean_environment

DEADLINE_S = 60
SGLANG = "sglang"
MOONCAKE = "mooncake"
WRAPT = "wrapt"
PROMETHEUS = "prometheus_client"
EVERYTHING = (SGLANG, MOONCAKE, WRAPT, PROMETHEUS)


@dataclasses.dataclass(frozen=True)
class Report:
    """What doctor has said with --json, and its exit status."""

    status: int
    verdict: str
    lines: list[dict[str, str]]
    whole: dict[str, Any]

    def line(self, subject: str) -> dict[str, str]:
        """The line about a subject, the worst if there are several."""
        about = [line for line in self.lines if line["subject"] == subject]
        assert about, f"an operator reads nothing about {subject}"
        return min(about, key=lambda line: ["error", "warning", "info", "ok"].index(line["mark"]))

    @property
    def errors(self) -> list[str]:
        return [line["subject"] for line in self.lines if line["mark"] == "error"]


@dataclasses.dataclass(frozen=True)
class Environment:
    """A Python with our package."""

    python: pathlib.Path

    @property
    def site(self) -> pathlib.Path:
        (found,) = self.python.parent.parent.glob("lib/python3*/site-packages")
        return found

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the Python; the switch is off unless `variables` say otherwise."""
        return subprocess.run(
            [self.python, *arguments],
            env=clean_environment(**variables),
            cwd=self.python.parent,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def doctor(self, *flags: str, **variables: str) -> Report:
        """Asks the doctor."""
        done = self.run(*flags, "-m", "sglang_failed_session_probe", "doctor", "--json", **variables)
        assert done.stdout, done.stderr[-3000:]
        said = json.loads(done.stdout)
        assert said["ready"] == (done.returncode == 0)
        return Report(done.returncode, said["verdict"], said["lines"], said)

    def add(self, file: str, text: str) -> None:
        """Writes a file into site-packages."""
        path = self.site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def make(
    folder: pathlib.Path, wheel: pathlib.Path, *packages: str, behind: str = "sglang-0.5.23", sglang: str = ""
) -> Environment:
    """A new environment with our wheel and links to these packages of the environment `behind`, or of `sglang`'s."""
    venv.EnvBuilder(symlinks=True).create(folder / "venv")
    made = Environment(folder / "venv" / "bin" / "python")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(made.site)
    for package in packages:
        name = sglang if package == SGLANG and sglang else behind
        there = Environment(environment.python(name)).site
        for entry in there.glob(f"{package}*"):
            (made.site / entry.name).symlink_to(entry)
    return made


def add_wheel_record(made: Environment, name: str, version: str, engine_hash: str = "sha256=AAAA") -> None:
    """Lets a wheel of Mooncake look installed."""
    folder = f"{name.replace('-', '_')}-{version}.dist-info"
    made.add(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    made.add(f"{folder}/RECORD", f"mooncake/__init__.py,,\nmooncake/engine.so,{engine_hash},1\n")
