"""Does the Chinese README say what the English one says, where a test can tell?"""

from __future__ import annotations

import re

import pytest
from kit.releases import CHECKOUT

ENGLISH, CHINESE = ((CHECKOUT / name).read_text() for name in ("README.md", "README.zh-CN.md"))


def code(text: str) -> list[str]:
    """Lines of code and what is in backquotes, in the order of their first appearance."""
    indented = [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return list(dict.fromkeys([*filter(None, indented), *re.findall(r"`([^`\n]+)`", text)]))


@pytest.mark.parametrize("piece", code(ENGLISH))
def test_what_an_operator_copies_is_in_both(piece: str) -> None:
    assert piece in CHINESE


def test_both_have_the_same_sections_tables_and_links() -> None:
    for mark in (r"^## ", r"^\|", r"^- ", r"\]\((?!README)[^)]+\)", r"!\["):
        english, chinese = (len(re.findall(mark, text, re.MULTILINE)) for text in (ENGLISH, CHINESE))
        assert english == chinese, f"{mark}: {english} and {chinese}"


def test_both_have_the_same_figures() -> None:
    """Numbers of two digits and more, or with a point: a figure that was measured again is changed in both."""
    english, chinese = (sorted(set(re.findall(r"\d+[.,]\d+|\d{2,}", text))) for text in (ENGLISH, CHINESE))
    assert english == chinese
