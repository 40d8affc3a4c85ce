"""Where do our files for SGLang's modules lie, and how is one read without SGLang?"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

_PACKAGE = pathlib.Path(__file__).resolve().parent


def source_folder() -> pathlib.Path:
    """The folder that holds our ``sglang`` tree: inside the package in a wheel, beside it in a checkout."""
    packed = _PACKAGE / "python"
    return packed if packed.is_dir() else _PACKAGE.parent


def load_settings() -> types.ModuleType:
    """Our ``sglang/srt/environ.py`` as a module of its own, whatever SGLang has. Raises OSError if it is not there."""
    name = f"{__package__}.settings_file"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source_folder() / "sglang/srt/environ.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look for it there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
