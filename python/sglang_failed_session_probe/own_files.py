"""Where do our files for SGLang's modules lie, and how is one read without SGLang?"""

from __future__ import annotations

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
        file = source_folder() / "sglang/srt/environ.py"
        code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        sys.modules[name] = types.ModuleType(name)  # dataclasses look for it there
        try:
            exec(code, vars(sys.modules[name]))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def leave_sglang_out() -> None:
    """Makes our files under ``sglang`` importable by their names without SGLang, whose import takes half a minute."""
    package = types.ModuleType("sglang")
    package.__path__ = [str(source_folder() / "sglang")]
    sys.modules.setdefault("sglang", package)
