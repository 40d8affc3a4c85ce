"""Is every line that the code can log in docs/log-lines.md, word for word?"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
from kit.releases import CHECKOUT

DOC = (CHECKOUT / "docs/log-lines.md").read_text()
CODE = sorted([*CHECKOUT.glob("python/sglang/**/*.py"), *CHECKOUT.glob("python/sglang_failed_session_probe/*.py")])
LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")


def lines_of(file: pathlib.Path) -> list[str]:
    """The format strings of all calls of a logger, and of each `_Line`, which has the kind before it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in LEVELS:
            texts = node.args
        elif isinstance(called, ast.Name) and called.id == "_Line":
            texts = node.args[1:]
        else:
            continue
        constants = (text.value for text in texts if isinstance(text, ast.Constant))
        found += [text for text in constants if isinstance(text, str) and " " in text][:1]
    return found


def in_doc(line: str) -> str:
    """As the docs write it: what differs each time is an ellipsis."""
    return re.sub(r"%(\(\w+\))?([srdg]|\.[01]f)", "...", line).split("\n")[0]


@pytest.mark.parametrize("line", [line for file in CODE for line in lines_of(file)])
def test_every_line_is_in_the_docs(line: str) -> None:
    assert f"`{in_doc(line)}`" in DOC, "an operator looks it up in vain"


def test_there_are_lines() -> None:
    assert sum(len(lines_of(file)) for file in CODE) >= 18
