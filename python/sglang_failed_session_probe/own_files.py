"""Which files of ours are for which of SGLang's modules, where do they lie, and how is one read without SGLang?"""

from __future__ import annotations

import functools
import pathlib
import sys
import types

ENVIRON = "sglang.srt.environ"
ENGINE = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
OLD_ENGINE = "sglang.srt.disaggregation.mooncake.transfer_engine"  # to 0.5.8.post1
CONN = "sglang.srt.disaggregation.mooncake.conn"
# For each of SGLang's modules that a file of ours runs in: our module, and the class that must be there, if any.
PATCHED = {
    ENVIRON: (ENVIRON, ""),
    ENGINE: (ENGINE, "MooncakeTransferEngine"),
    OLD_ENGINE: (ENGINE, "MooncakeTransferEngine"),
    CONN: (CONN, "MooncakeKVManager"),
}
_PACKAGE = pathlib.Path(__file__).resolve().parent


def source_folder() -> pathlib.Path:
    """The folder that holds our ``sglang`` tree: inside the package in a wheel, beside it in a checkout."""
    packed, beside = _PACKAGE / "python", _PACKAGE.parent
    # In an installation whose files are gone, what lies beside it is SGLang itself.
    return packed if packed.is_dir() or (beside / "sglang" / "__init__.py").exists() else beside


def file_of(module: str) -> pathlib.Path:
    """Where our file for the module of that name would be; there may be none."""
    return source_folder().joinpath(*module.split(".")).with_suffix(".py")


@functools.cache
def load_settings() -> types.ModuleType:
    """Our ``sglang/srt/environ.py`` as a module of its own, whatever SGLang has. Raises OSError if it is not there."""
    file = file_of(ENVIRON)
    code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    module = types.ModuleType(f"{__package__}.settings_file")
    sys.modules[module.__name__] = module  # dataclasses look for it there
    exec(code, vars(module))
    return module


def leave_sglang_out() -> None:
    """Makes our files importable by their names under ``sglang`` without SGLang, whose import takes half a minute."""
    package = types.ModuleType("sglang")
    package.__path__ = [str(source_folder() / "sglang")]
    sys.modules.setdefault("sglang", package)
