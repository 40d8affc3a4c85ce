"""Can what is to be released be installed, and are both doors open then?

    python tools/check_packages.py FOLDER     FOLDER holds one sdist and one wheel

Installs each into an empty environment, as pip does it for an operator, and asks the interpreter there.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
import venv

import tomllib

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
SWITCH = "SGLANG_ENABLE_FAILED_SESSION_PROBE"
DEADLINE_S = 300.0
# In the environment: the version, what the entry point is, and whether the .pth door has let the patch in.
ASK = """
import importlib.metadata, sys
print(importlib.metadata.version("sglang-failed-session-probe"))
print(*(point.load().__name__ for point in importlib.metadata.entry_points(group="sglang.srt.plugins")))
print("sglang_failed_session_probe.patch" in sys.modules)
"""


class Broken(Exception):
    """A package is not fit to be released; the message says why."""


def check(package: pathlib.Path, version: str) -> None:
    """Installs the package into an empty environment. Raises Broken if something is not as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        venv.EnvBuilder(with_pip=True).create(folder)
        python = f"{folder}/bin/python"
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(package)])
        run([python, "-m", "pip", "check"])
        for switch, patched in (("1", "True"), ("0", "False"), ("", "False")):
            said = run([python, "-c", ASK], {SWITCH: switch}).split()
            if said != [version, "activate", patched]:
                raise Broken(f"{package.name}: with {SWITCH}={switch} it says {said}")


def run(command: list[str], variables: dict[str, str] | None = None) -> str:
    """Runs a command and gives what it prints."""
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **(variables or {})}, capture_output=True, text=True, timeout=DEADLINE_S
    )
    if done.returncode:
        raise Broken(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def main(folder: str) -> None:
    """Check both packages, and that the newest entry of CHANGELOG.md that is released is this version's."""
    version = str(tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"])
    newest = re.search(r"^## (?!Unreleased)(\S+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if newest is None or newest[1] != version:
        raise Broken(f"the newest entry of CHANGELOG.md is not for {version}")
    packages = sorted(pathlib.Path(folder).glob(f"sglang_failed_session_probe-{version}*"))
    kinds = {"wheel" if package.suffix == ".whl" else "sdist" for package in packages}
    if len(packages) != 2 or len(kinds) != 2:
        raise Broken(f"{folder} does not hold one sdist and one wheel of {version}: {[it.name for it in packages]}")
    for package in packages:
        check(package, version)
        print(f"{package.name}: installs into an empty environment, both doors are open")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Broken as error:
        sys.exit(str(error))
