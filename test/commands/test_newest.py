"""Does `make newest` name the patch point that a release has lost? On a registry of its own, with small packages."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import zipfile

from kit.releases import CHECKOUT, environment
from test_patch_points import CONN, SMALL

TAG = "py3-none-any"
FOR_CUDA, FOR_ROCM = "mooncake-transfer-engine-cuda13", "mooncake-transfer-engine-rocm"


def publish(registry: pathlib.Path, package: str, version: str, files: dict[str, str]) -> None:
    """Put a wheel into the registry."""
    about = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(registry / f"{package}-{version}-{TAG}.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {TAG}\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_the_newest_release_is_read_and_the_patch_point_that_it_lost_is_named(tmp_path: pathlib.Path) -> None:
    renamed = {**SMALL, CONN: SMALL[CONN].replace("failed_sessions", "dead_sessions")}
    publish(tmp_path, "sglang", "9.8", {f"sglang/{name}": text for name, text in SMALL.items()})
    publish(tmp_path, "sglang", "9.9", {f"sglang/{name}": text for name, text in renamed.items()})
    (tmp_path / "sglang-10.0.tar.gz").touch()  # published before its wheel
    for package, version in ((environment.MOONCAKE, "0.9"), (FOR_CUDA, "0.10"), (FOR_ROCM, "0.11")):
        publish(tmp_path, package.replace("-", "_"), version, {})
    ended = subprocess.run(
        [sys.executable, CHECKOUT / "tools" / "newest.py"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    first, *wheels, last = ended.stdout.splitlines()
    assert first == "the newest are SGLang 9.9 and Mooncake 0.10"
    assert f"  {environment.MOONCAKE} 0.9" in wheels
    assert f"  {FOR_CUDA} 0.10" in wheels
    assert f"  {FOR_ROCM} 0.11, which cannot be run here" in wheels
    assert "SGLang 9.9 has no MooncakeKVManager.failed_sessions" in last
    assert ended.returncode == 1
