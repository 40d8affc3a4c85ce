"""Where can our package and SGLang lie? Makes environments in which they do."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Optional

from kit.releases import CHECKOUT, environment
from kit.stock_node import clean_environment

RUN_DEADLINE_S = 100
PIP_DEADLINE_S = 300
DOOR = "sglang_failed_session_probe.pth"

# What `pip install -e` of setuptools leaves in site-packages: a finder that knows one package.
FINDER = """
import importlib.util, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sglang":
            return importlib.util.spec_from_file_location(name, {file!r}, submodule_search_locations=[{folder!r}])

sys.meta_path.append(Finder)
"""


@dataclasses.dataclass(frozen=True)
class Installation:
    """An environment with our package: its python, and the folders from which SGLang and our files are to come."""

    python: pathlib.Path
    sglang: pathlib.Path
    ours: pathlib.Path

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the python, with the switch off unless `variables` say otherwise. Raises if it fails or hangs."""
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            env=clean_environment(**variables),
            cwd=self.python.parent,
            capture_output=True,
            text=True,
            timeout=RUN_DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    def pip(self, *arguments: object) -> None:
        command = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_DEADLINE_S)
        assert done.returncode == 0, done.stderr[-3000:]

    @contextlib.contextmanager
    def without_pth_door(self) -> Iterator[None]:
        """Take the .pth door away for a while, so that the entry point is alone."""
        door = site_packages(self.python) / DOOR
        aside = door.with_suffix(".aside")
        door.rename(aside)
        try:
            yield
        finally:
            aside.rename(door)


def install(name: str, wheel: Optional[pathlib.Path], sglang: str, folder: pathlib.Path) -> Installation:
    """Make a thin environment in front of the environment `name` and install our package: the wheel, or else editable.

    `sglang` says how SGLang lies there: "installed", "by finder" or "by path" (the two ways of editable installs).
    """
    python = environment.in_front_of(name, folder / "venv")
    site = site_packages(python)
    here = Installation(
        python, folder if sglang != "installed" else environment.VENVS, CHECKOUT if wheel is None else site
    )
    if sglang != "installed":
        _move_sglang(python, sglang, folder)
    here.pip("install", *([wheel, "--no-deps"] if wheel else ["--editable", CHECKOUT]))
    return here


def site_packages(python: pathlib.Path) -> pathlib.Path:
    (found,) = python.parent.parent.glob("lib/python3*/site-packages")
    return found


def _move_sglang(python: pathlib.Path, how: str, folder: pathlib.Path) -> None:
    """Let SGLang be found in a source tree, as after `pip install -e` of it, and nowhere else."""
    behind, tree = folder / "behind", folder / "checkout" / "python"
    behind.mkdir()
    tree.mkdir(parents=True)
    list_path = [python, "-c", "import sys; print(*[p for p in sys.path if p.endswith('site-packages')], sep='\\n')"]
    folders = subprocess.run(list_path, check=True, capture_output=True, text=True, timeout=RUN_DEADLINE_S).stdout
    for entry in [entry for found in folders.split() for entry in pathlib.Path(found).iterdir()]:
        if entry.name == "sglang" and not (tree / "sglang").exists():
            (tree / "sglang").symlink_to(entry)
        elif not entry.name.startswith("sglang") and entry.suffix != ".pth" and not (behind / entry.name).exists():
            (behind / entry.name).symlink_to(entry)
    site = site_packages(python)
    (site / "00-behind.pth").write_text(f"{behind}\n")
    if how == "by path":
        (site / "__editable__.sglang.pth").write_text(f"{tree}\n")
    else:
        finder = FINDER.format(file=str(tree / "sglang" / "__init__.py"), folder=str(tree / "sglang"))
        (site / "__editable___sglang_finder.py").write_text(finder)
        (site / "__editable__.sglang.pth").write_text("import __editable___sglang_finder\n")
