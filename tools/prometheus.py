"""Where do Prometheus and promtool come from?

    python3 tools/prometheus.py     fetches or reuses them; the last line on stdout is the folder that they are in

From Debian's package, unpacked beside the virtual environments and not installed: no service is started. Where they are
on PATH already, those are taken. Standard library only.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile

import environment

PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")


def folder() -> pathlib.Path:
    """The folder that holds `prometheus` and `promtool`; the package is fetched (19 MB) unless it is there.

    Raises environment.CannotMake where it cannot be had. Safe to call from several processes at once.
    """
    on_path = [shutil.which(program) for program in PROGRAMS]
    if on_path[0] and on_path[1]:
        return pathlib.Path(on_path[0]).parent
    unpacked = environment.VENVS / PACKAGE
    with environment.locked(PACKAGE):
        if not unpacked.exists():
            _fetch(unpacked)
    return unpacked / "usr" / "bin"


def _fetch(unpacked: pathlib.Path) -> None:
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise environment.CannotMake(f"Prometheus comes from Debian's package, which needs {', '.join(missing)}")
    environment.say("download: 19 MB, on disk: 100 MB")
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as work:
        download = ["env", "--chdir", work, "apt-get", "download", PACKAGE]
        if environment.run(download).returncode:
            environment.run(["apt-get", "update"])  # the lists may be missing or old
            done = environment.run(download)
            if done.returncode:
                raise environment.CannotMake(f"apt-get download {PACKAGE} failed:\n{done.stdout[-500:]}")
        (package,) = pathlib.Path(work).glob("*.deb")
        done = environment.run(["dpkg", "-x", str(package), f"{work}/unpacked"])
        if done.returncode:
            raise environment.CannotMake(f"{package.name} cannot be unpacked:\n{done.stdout[-500:]}")
        pathlib.Path(work, "unpacked").rename(unpacked)  # at once, so that half of it is never taken for all


if __name__ == "__main__":
    try:
        print(folder())
    except environment.CannotMake as error:
        environment.say(str(error))
        sys.exit(1)
