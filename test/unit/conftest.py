"""How does hypothesis try things out, how is a manager made, how is a piece of Python run in a process of its own?"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from kit.managers import ENABLE, NO_MEMORY, MakeManager
from kit.paths import PYTHON_FOLDER
from sglang.srt.disaggregation.mooncake import conn
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
from sglang.srt.disaggregation.mooncake.session_probe import Reads

settings.register_profile("unit", deadline=None, database=None, derandomize=True)
settings.load_profile("unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What plays hundreds of sessions in virtual time takes long."""
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("number", 0) >= 300:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def run_python(tmp_path: pathlib.Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script with our files and those in ``tmp_path`` on the path, and the given environment variables."""

    def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PYTHON_FOLDER)])}
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**inherited, **paths, **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


@pytest.fixture
def make_manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeManager]:
    """Makes standing-alone managers whose engines are Python objects, with the feature on unless told otherwise."""
    managers = []
    monkeypatch.setenv(ENABLE, "1")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_SETTLE_S", "0.1")
    monkeypatch.setattr(conn._FailedSessionProber, "reads_prove_nothing", False)
    monkeypatch.setattr(Reads, "LATE_S", 10.0)  # its reads wait for no lane, however slow the machine

    def make(engine: Any, role: Any = "prefill") -> Any:
        monkeypatch.setattr(MooncakeKVManager, "init_engine", lambda self: setattr(self, "engine", engine))
        manager = MooncakeKVManager(NO_MEMORY, role)
        engine.manager = manager
        managers.append(manager)
        return manager

    yield make
    for manager in managers:
        manager.engine.goes_on.set()
        manager.teardown()
        assert manager.engine.looked_at_too_often == [], "Mooncake has let go of a batch that has ended"
