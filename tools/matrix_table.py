"""On which releases of SGLang does what work? `matrix_table.py PAGE REPORT...` writes the table that ends PAGE.

REPORT is the JUnit file of one release's tests, RELEASE.xml. A row of PAGE whose release has no report stays as it is.
"""

from __future__ import annotations

import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

HEADER = """\
| release | native probe | loaded by | recovery | registration | off | deactivated | teardown | Ascend | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | ---: |"""
PLUGIN = "test_where_sglang_has_plugins_the_entry_point_alone_is_enough"
ROW = re.compile(r"^\| (\d[\w.]*) \|.*$", re.MULTILINE)


def row(report: pathlib.Path) -> str:
    """One release: what it passed, from the names of its tests; "not there" where SGLang lacks what they are about."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    plugin = outcome(cases, PLUGIN)
    recovery = outcome(cases, "test_story.")
    cells = [
        report.stem,
        next((property.get("value", "") for property in ElementTree.parse(report).iter("property")), "?"),
        {"passed": "plugin, .pth", "not there": ".pth"}.get(plugin, plugin) if recovery == "passed" else recovery,
        recovery,
        outcome(cases, "test_a_registration_clears"),
        outcome(cases, "test_switched_off."),
        outcome(cases, "test_activation.", but=PLUGIN),
        outcome(cases, "test_teardown."),
        outcome(cases, "test_ascend."),
        f"{sum(float(case.get('time', 0)) for case in cases):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def outcome(cases: list[ElementTree.Element], named: str, but: str = "nothing") -> str:
    """How the tests ended that have this in their name, or in that of their file."""
    names = [(f"{case.get('classname')}.{case.get('name')}", case) for case in cases]
    those = [case for name, case in names if named in name and but not in name]
    if not those:
        return "**not run**"
    if any(case.find(wrong) is not None for case in those for wrong in ("failure", "error")):
        return "**failed**"
    return "passed" if any(case.find("skipped") is None for case in those) else "not there"


def by_version(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def write(page: pathlib.Path, reports: list[pathlib.Path]) -> None:
    """Put the rows of the reports into the table, the newest release first."""
    prose, _, table = page.read_text().partition(HEADER)
    rows = {match[1]: match[0] for match in ROW.finditer(table)} | {report.stem: row(report) for report in reports}
    ordered = [rows[release] for release in sorted(rows, key=by_version, reverse=True)]
    page.write_text("\n".join([prose + HEADER, *ordered, ""]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    write(pathlib.Path(sys.argv[1]), [pathlib.Path(name) for name in sys.argv[2:]])
