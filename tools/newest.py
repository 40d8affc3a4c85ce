"""Do the newest SGLang and the newest Mooncake that the registry has still fit the patch?

    python3 tools/newest.py

Reads the patch points of that SGLang, and plays the whole story on two managers of it, on the newest Mooncake that any
of its wheels has, if that can be run on a machine without a GPU. Exit status 1 if one of them fails; the last line then
says which patch point is gone, or that all are there and the story has failed.
Standard library only, like environment.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import environment

# All packages whose wheels have the import name `mooncake`; those that can be run here first.
RUNNABLE = (environment.MOONCAKE, *environment.MOONCAKE_FOR_CUDA)
OTHERS = (
    "mooncake-transfer-engine",
    *(f"mooncake-transfer-engine-{kind}" for kind in ("efa", "efa-cuda13", "efa-non-cuda", "musa", "npu", "rocm")),
)
CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
EXAMINE = """
import pathlib, sys
from sglang_failed_session_probe import patch_points
points = patch_points.examine(pathlib.Path(sys.argv[1]))
for finding in points.findings:
    print(f"  {finding.name}: {finding.where or 'not found'}")
trouble = [f"SGLang {points.release} has no {missing}" for missing in points.missing] + [
    f"in SGLang {points.release} {doubt}" for doubt in points.doubts]
print("; ".join(trouble) or f"the patch points of SGLang {points.release} are all there")
sys.exit(bool(trouble))
"""


def newest(package: str) -> str:
    """The newest version that has a wheel for this machine. Raises CannotMake if there is none."""
    arguments = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", "-", package]
    python = environment.python("engines")
    done = environment.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments])
    if done.returncode:
        raise environment.CannotMake(f"pip finds no {package}:\n{done.stdout[-2000:]}")
    (found,) = json.loads(done.stdout[done.stdout.index("{") :])["install"]
    return str(found["metadata"]["version"])


def newest_mooncakes() -> dict[str, str]:
    """The newest version of each of Mooncake's packages that has a wheel for this machine.

    Raises CannotMake if none has that can be run here.
    """
    found = {}
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        looks = {package: threads.submit(newest, package) for package in (*RUNNABLE, *OTHERS)}
    for package, look in looks.items():
        with contextlib.suppress(environment.CannotMake):
            found[package] = look.result()
    if not found.keys() & set(RUNNABLE):
        raise environment.CannotMake(f"pip finds none of {', '.join(RUNNABLE)}")
    return found


def by_numbers(version: str) -> list[int]:
    """A key to sort versions by."""
    return [int(number) for number in re.findall(r"\d+", version)]


def unpacked(package: str, version: str, folder: pathlib.Path) -> pathlib.Path:
    """Download that wheel and unpack it; return the folder of its package."""
    python = environment.python("engines")
    download = [
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
        f"{package}=={version}",
    ]
    done = environment.run([str(python), "-m", "pip", *download])
    if done.returncode:
        raise environment.CannotMake(f"pip cannot download {package} {version}:\n{done.stdout[-2000:]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder / package


def main() -> int:
    """Say what is newest, read its patch points, play the story."""
    sglang, mooncakes = newest("sglang"), newest_mooncakes()
    mooncake = max((mooncakes[package] for package in RUNNABLE if package in mooncakes), key=by_numbers)
    print(f"the newest are SGLang {sglang} and Mooncake {mooncake}")
    for package, version in mooncakes.items():
        beyond = ", which cannot be run here" if by_numbers(version) > by_numbers(mooncake) else ""
        print(f"  {package} {version}{beyond}", flush=True)
    python = environment.python("engines")
    with tempfile.TemporaryDirectory() as folder:
        package = unpacked("sglang", sglang, pathlib.Path(folder))
        variables = {**os.environ, "PYTHONPATH": str(CHECKOUT / "python")}
        if subprocess.run([python, "-c", EXAMINE, package], env=variables).returncode:
            return 1
    variables = {**os.environ, "SGLANG_RELEASES": sglang, "MOONCAKE_RELEASE": mooncake}
    tests = ["-m", "pytest", "-m", "every_release", "test/activation", "test/stock"]
    if subprocess.run([python, *tests], env=variables, cwd=CHECKOUT).returncode:
        print(f"the patch points of SGLang {sglang} are all there, and on Mooncake {mooncake} the story has failed")
        return 1
    print(f"the patch heals SGLang {sglang} on Mooncake {mooncake}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except environment.CannotMake as error:
        sys.exit(f"newest: {error}")
