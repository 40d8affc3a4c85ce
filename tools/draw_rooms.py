"""Which module imports which, and what may a session decide, and when? Draws docs/rooms.md from the code.

    python3 tools/draw_rooms.py

test/docs/test_rooms.py sees that the page is as this draws it.
"""

from __future__ import annotations

import ast
import graphlib
import pathlib
import re
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = CHECKOUT / "python"
sys.path.insert(0, str(PYTHON))

from sglang_failed_session_probe.own_files import PATCHED  # noqa: E402

PAGE = CHECKOUT / "docs/rooms.md"
STATES, WATCH = (PYTHON / f"sglang/srt/disaggregation/mooncake/session_{name}.py" for name in ("states", "watch"))
FILES = {
    ".".join(file.relative_to(PYTHON).with_suffix("").parts): file
    for folder in ("sglang", "sglang_failed_session_probe")
    for file in sorted((PYTHON / folder).rglob("*.py"))
}


def imports_of(module: str) -> set[str]:
    """The modules of ours that it imports, be it in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            package = ".".join([*above, *filter(None, [node.module])])
            names = [f"{package}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else package for name in names}
    return {module for name in found for module in (name, f"{name}.__init__") if module in FILES}


IMPORTS = {module: imports_of(module) for module in FILES}


def top_down() -> list[str]:
    """The modules, each before those that it imports. Raises graphlib.CycleError where there is a circle."""
    graph = {module: sorted(IMPORTS[module]) for module in FILES}
    return [*graphlib.TopologicalSorter(graph).static_order()][::-1]


def short(module: str) -> str:
    return module.split(".")[-1]


def rooms(modules: list[str], beside: list[str], *more: str) -> str:
    """A picture of these modules, and an arrow to each that they import, of these and of those ``beside``."""
    lines = ["```mermaid", "flowchart TD"]
    for module in modules:
        imported = [short(other) for other in modules + beside if other in IMPORTS[module]]
        lines.append(f"    {short(module)}" + (" --> " + " & ".join(imported) if imported else ""))
    return "\n".join([*lines, *more, "```"])


def class_body(file: pathlib.Path, name: str) -> list[ast.stmt]:
    classes = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef))
    return next(node.body for node in classes if node.name == name)


def methods_of(file: pathlib.Path, class_name: str) -> list[ast.FunctionDef]:
    return [node for node in class_body(file, class_name) if isinstance(node, ast.FunctionDef)]


def calls_in(method: ast.FunctionDef) -> list[tuple[str, list[str]]]:
    """What it calls, without ``self.``, and with which arguments."""
    calls = (node for node in ast.walk(method) if isinstance(node, ast.Call))
    return [(ast.unparse(call.func).removeprefix("self."), [*map(ast.unparse, call.args)]) for call in calls]


def decisions() -> dict[str, list[str]]:
    """What each method of a session may decide, by itself or by one that it calls."""
    (kinds,) = re.findall(r"^Decision = (.+) \| None", STATES.read_text(), re.MULTILINE)
    methods = [method for method in methods_of(STATES, "Session") if ast.unparse(method).count("-> Decision:")]
    called = {method.name: {name for name, _ in calls_in(method)} for method in methods}
    for _ in called:
        called = {name: others.union(*(called.get(other, ()) for other in others)) for name, others in called.items()}
    return {name: [kind for kind in kinds.split(" | ") if kind in called[name]] for name in called if name[0] != "_"}


def events() -> dict[str, list[str]]:
    """Which methods of the watch tell each event."""
    names = [ast.unparse(node.targets[0]) for node in class_body(WATCH, "Event") if isinstance(node, ast.Assign)]
    told = [
        (arguments[0], method.name)
        for method in methods_of(WATCH, "SessionWatch")
        for called, arguments in calls_in(method)
        if called == "_tell"
    ]
    return {name: [method for event, method in told if event == f"Event.{name}"] for name in names}


def parts() -> dict[str, str]:
    """What is drawn, by the name of its place in the page."""
    ours = [module for module in top_down() if module.startswith("sglang.")]
    package = [module for module in top_down() if not module.startswith("sglang.")]
    patched = sorted({short(module) for module, _ in PATCHED.values()})
    used = {other: [short(module) for module in ours if other in IMPORTS[module]] for other in package}
    return {
        "rooms": rooms(ours, []),
        "package": rooms(package, ours, f"    patch -. runs .-> {' & '.join(patched)}"),
        "used": "\n".join(f"- `{short(other)}`: {listed(users)}" for other, users in used.items() if users),
        "decisions": table("method of `Session`", "what it may decide", decisions()),
        "events": table("event", "method of `SessionWatch` that tells it", events()),
    }


def table(left: str, right: str, rows: dict[str, list[str]]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {listed(names)} |" for name, names in rows.items())])


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def drawn(page: str) -> str:
    """The page with each part as the code is now."""
    for name, part in parts().items():
        before, mark, rest = page.partition(f"<!-- drawn: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{mark}{part}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
