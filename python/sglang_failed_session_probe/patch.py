"""Which of SGLang's modules are changed, when, and how is each change taken back?

A file of ours that SGLang has too runs in SGLang's own module of that name, right after SGLang's own code. A file that
SGLang does not have is a new module there.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import pathlib
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any, Optional

import wrapt

from sglang_failed_session_probe.harmless_logger import HarmlessLogger
from sglang_failed_session_probe.own_files import PATCHED, file_of

_logger = HarmlessLogger(__name__)

# The function that each of our files must have: patch_failed_session_probe(patch, namespace of SGLang's module).
_ENTRY = "patch_failed_session_probe"


class _NewModules(importlib.abc.MetaPathFinder):
    """Finds our modules that SGLang does not have. It is asked last, so that SGLang's own modules come first."""

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]] = None, target: Optional[types.ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        _, wanted = PATCHED.get(fullname, ("", ""))
        if not fullname.startswith("sglang.") or wanted:
            return None  # a file that changes a class of SGLang's is no module without it
        return importlib.machinery.PathFinder.find_spec(fullname, [str(file_of(fullname).parent)])


class Patch:
    """All changes made in this process, so that they can be taken back."""

    def __init__(self) -> None:
        self.active = True
        self.changed: set[str] = set()
        self._lock = threading.Lock()
        self._undo: list[tuple[Any, str, object]] = []

    def replace(self, owner: Any, name: str, value: object) -> None:
        """Sets an attribute; ``take_back`` restores its old value, or deletes it where there was none."""
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def give_up(self, missing: str) -> None:
        """Takes everything back and logs, once, what this release does not have. Any thread may call it."""
        if self.take_back():
            _logger.error(
                "Failed-session probe is NOT active: SGLang %s has no %s. SGLang runs on unpatched; "
                "look for a release of sglang-failed-session-probe that supports it",
                self.sglang_version(),
                missing,
            )

    def take_back(self) -> bool:
        """Undoes every change, the last one first; True for the first call. Any thread may call it."""
        with self._lock:
            was_active, self.active = self.active, False
            while self._undo:
                owner, name, before = self._undo.pop()
                with contextlib.suppress(Exception):  # somebody else may have deleted it
                    if before is _ABSENT:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, before)
        return was_active

    def sglang_version(self) -> str:
        return getattr(sys.modules.get("sglang"), "__version__", "of unknown version")


_ABSENT = object()
_new_modules = _NewModules()
_patch: Optional[Patch] = None


def install() -> None:
    """Has SGLang's modules changed: each when it is imported, or now if it already is. May be called again."""
    global _patch
    if _patch is not None:
        return
    _patch = Patch()
    sys.meta_path.append(_new_modules)
    for name in PATCHED:
        wrapt.register_post_import_hook(_change, name)


def uninstall() -> None:
    """Takes back what ``install`` has done; import hooks that run after this do nothing."""
    global _patch
    if _patch is not None:
        _patch.take_back()
        _patch = None
        sys.meta_path.remove(_new_modules)


def _change(module: types.ModuleType) -> None:
    """Runs our file in SGLang's module. Import hooks call this: nothing may escape it."""
    patch = _patch
    if patch is None or not patch.active or module.__name__ in patch.changed:
        return
    patch.changed.add(module.__name__)
    try:
        ours, wanted = PATCHED[module.__name__]
        source = file_of(ours)
        if module.__file__ == str(source):
            return  # SGLang has no such module: this is our own
        if wanted and not hasattr(module, wanted):
            patch.give_up(f"{module.__name__}.{wanted}")
            return
        if _ENTRY not in vars(module):
            _run_in(module, source)
        if patch.active:  # the file imports other modules, whose patch may have given up
            vars(module)[_ENTRY](patch, vars(module))
    except Exception:
        patch.take_back()
        _logger.error(
            "Failed-session probe is NOT active: it does not fit %s of SGLang %s, which runs on unpatched",
            module.__name__,
            patch.sglang_version(),
            exc_info=True,
        )


def _run_in(module: types.ModuleType, source: pathlib.Path) -> None:
    """Runs the file in the module's namespace. Restores that if the file raises, or changes a name that was there."""
    names = vars(module)
    before = dict(names)
    try:
        exec(compile(source.read_bytes(), str(source), "exec", dont_inherit=True), names)
        names["__doc__"] = before["__doc__"]
        taken = sorted(name for name in before if names.get(name) is not before[name])
        if taken:
            raise RuntimeError(f"{module.__name__} has names of its own that this file needs: {', '.join(taken)}")
    except Exception:
        for name in names.keys() - before.keys():
            del names[name]
        names.update(before)
        raise
