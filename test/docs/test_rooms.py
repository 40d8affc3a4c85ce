"""Do the pictures of docs/rooms.md and the tables of CONTRIBUTING.md say what the code is?"""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

from tools import break_mechanisms, draw_rooms

CHECKOUT = draw_rooms.CHECKOUT
ROOMS = draw_rooms.PAGE.read_text()
CONTRIBUTING = (CHECKOUT / "CONTRIBUTING.md").read_text()
HOW_IT_WORKS = (CHECKOUT / "docs/how-it-works.md").read_text()
# The picture of a session's way: its methods with what they decide, and the events.
(WAY,) = re.findall(r"flowchart TD\n    untracked(.*?)```", ROOMS, re.DOTALL)
DECIDED = re.findall(r"(\w+)\(\): (\w+)", WAY)
EVENTS = {*re.findall(r"\b[A-Z_]{2,}\b", WAY)} - {"INTERVAL", "IDLE_TIMEOUT"}


def in_table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of CONTRIBUTING.md, without its head."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


RULES = in_table("Where each rule lives")


def asked_first() -> dict[tuple[str, str], list[str]]:
    """Which test files the list of mechanisms asks first, by the file and the name of the function that it breaks."""
    tests: dict[tuple[str, str], list[str]] = {}
    for broken in break_mechanisms.BREAKS:
        function = inspect.unwrap(getattr(broken.function, "fget", broken.function))
        file = pathlib.Path(inspect.getfile(function)).relative_to(CHECKOUT)
        nearest = f"{break_mechanisms.UNIT}/{break_mechanisms.NEAREST.get(file.name)}"
        asked = nearest if broken.tests == break_mechanisms.UNIT else broken.tests
        tests.setdefault((str(file), function.__qualname__), []).append(asked)
    return tests


ASKED_FIRST = asked_first()


def test_modules_imports_decisions_and_events_are_drawn_as_they_are() -> None:
    assert draw_rooms.drawn(ROOMS) == ROOMS, "run tools/draw_rooms.py, and see whether that is the way it should be"


def test_no_import_leads_back() -> None:
    assert set(draw_rooms.top_down()) == set(draw_rooms.FILES)


@pytest.mark.parametrize("module", [module for module in draw_rooms.FILES if module.startswith("sglang.")])
def test_how_it_works_says_which_question_a_file_of_ours_answers(module: str) -> None:
    assert f"`{draw_rooms.short(module)}.py`" in HOW_IT_WORKS


def test_a_session_goes_only_ways_that_the_code_knows() -> None:
    assert [(method, kind) for method, kind in DECIDED if kind not in draw_rooms.decisions().get(method, [])] == []
    assert set(draw_rooms.events()) >= EVENTS


def test_no_method_decision_or_event_of_a_session_is_left_out_of_its_way() -> None:
    decisions = draw_rooms.decisions()
    assert {method for method, _ in DECIDED} == set(decisions)
    assert {kind for _, kind in DECIDED} == {kind for kinds in decisions.values() for kind in kinds}
    assert set(draw_rooms.events()) - EVENTS == {"MALFORMED", "FAULT"}  # no states of a session


@pytest.mark.parametrize(("function", "virtual", "real"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_a_rule_is_where_the_table_says_and_goes_with_its_test(function: str, virtual: str, real: str) -> None:
    """The list of mechanisms switches something off in that function, and that test is asked first."""
    name, file = re.findall(r"`([^`]+)`", function)
    place = in_folder(file, "python/sglang/srt/disaggregation/mooncake"), name
    assert in_folder(virtual, "test/unit") in ASKED_FIRST.get(place, [])
    assert (CHECKOUT / in_folder(real, "test/faults")).is_file()


def in_folder(file: str, folder: str) -> str:
    """A file without a folder is in that one."""
    name = file.strip("`")
    return name if "/" in name else f"{folder}/{name}"


def test_there_are_rules() -> None:
    assert len(RULES) > 20


@pytest.mark.parametrize(("targets", "times"), [row[:2] for row in in_table("How long it takes")])
def test_a_target_takes_as_long_as_it_says_where_it_is_described(targets: str, times: str) -> None:
    pages = [CHECKOUT / "Makefile", *CHECKOUT.glob("docs/*.md")]
    paragraphs = [part for page in pages for part in page.read_text().split("\n\n")]
    for target, time in zip(re.findall(r"`make ([\w-]+)`", targets), times.split(", "), strict=True):
        about = [part for part in paragraphs if re.search(rf"^{target}:|make {target}\b(?!-)", part, re.MULTILINE)]
        assert any(time in re.sub(r"\s+#?\s*", " ", part).lower() for part in about), f"make {target}"


@pytest.mark.parametrize(
    "path",
    [path for path in re.findall(r"\]\(([^)]+)\)|`([\w./-]+)`", CONTRIBUTING) for path in path if "/" in path],
)
def test_what_a_contributor_is_sent_to_is_there(path: str) -> None:
    assert (CHECKOUT / path).exists()
