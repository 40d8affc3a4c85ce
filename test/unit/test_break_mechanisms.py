"""Can each mechanism of tools/break_mechanisms.py still be switched off as it says there, and is it in the docs?"""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools/break_mechanisms.py"
spec = importlib.util.spec_from_file_location("break_mechanisms", TOOL)
assert spec is not None
assert spec.loader is not None
break_mechanisms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(break_mechanisms)


@pytest.mark.parametrize("broken", break_mechanisms.BREAKS, ids=lambda broken: broken.mechanism)
def test_a_mechanism_can_be_switched_off_and_what_is_left_is_python(broken: break_mechanisms.Break) -> None:
    file, text = broken.broken()
    assert text != (break_mechanisms.CHECKOUT / file).read_text()
    compile(text, str(file), "exec")


def test_the_docs_name_each_mechanism() -> None:
    page = (break_mechanisms.CHECKOUT / "docs/faults.md").read_text()
    rows = re.findall(r"^\| (.*?) \|", page.partition("| mechanism, switched off |")[2], re.MULTILINE)
    assert rows[1:] == [broken.mechanism for broken in break_mechanisms.BREAKS]
