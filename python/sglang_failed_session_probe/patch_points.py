"""Does the patch fit this SGLang? Reads the files of an unedited release; imports neither SGLang nor what it needs.

What the patch refuses at run time with an ERROR line is ``missing`` here, in the same words, where the code leaves no
doubt. ``doubts`` are the rest: what it refuses or does not see at run time, such as a use without the lock.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Optional

from sglang_failed_session_probe.own_files import source_folder

_CONN = "sglang.srt.disaggregation.mooncake.conn"
_ENGINE = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
_OLD_ENGINE = "sglang.srt.disaggregation.mooncake.transfer_engine"  # to 0.5.8.post1
_ENVIRON = "sglang.srt.environ"
_PLUGINS = "sglang.srt.plugins"
_MANAGER = "MooncakeKVManager"
_ENGINE_CLASS = "MooncakeTransferEngine"
_ROLE = "disaggregation_mode"
_BLACKLIST = "failed_sessions"
_LOCK = "session_lock"
_SECOND_ATTRIBUTE = "another attribute is the same set"
_FIELD_TYPES = ("EnvBool", "EnvFloat", "EnvInt")

_WRITERS = frozenset(
    name for name in dir(set) if name in ("add", "discard", "remove", "clear", "pop") or "update" in name
)
# They make something new of the set, or only look at it.
_LOOKS = frozenset(
    {"list", "set", "sorted", "tuple", "frozenset", "dict", "len", "bool", "any", "all", "min", "max", "sum"}
    | {"str", "repr", "isinstance", "type", "id", "print", "enumerate", "filter", "map", "reversed"}
)
_LOOKING_NODES = (
    ast.Compare,
    ast.BinOp,
    ast.UnaryOp,
    ast.FormattedValue,
    ast.Starred,
    ast.Subscript,
    ast.Expr,
    ast.AugAssign,
    ast.Assert,
    ast.If,
    ast.While,
    ast.For,
    ast.comprehension,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef

SWITCH = "SGLANG_ENABLE_FAILED_SESSION_PROBE"
ON_BY_DEFAULT = f"{SWITCH} is on by default"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked for; ``where`` is "file:line", empty where nothing was found."""

    name: str
    found: bool
    where: str
    needed: bool = True


@dataclasses.dataclass(frozen=True)
class PatchPoints:
    """What a release has of that which the patch needs."""

    release: str
    missing: tuple[str, ...]
    doubts: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def fits(self) -> bool:
        """True if nothing is missing and nothing doubtful."""
        return not self.missing and not self.doubts

    def has(self, name: str) -> bool:
        """True if the finding of this name is there, e.g. "native probe", "teardown" or "plugins"."""
        return any(finding.found for finding in self.findings if finding.name == name)


def find_sglang() -> Optional[pathlib.Path]:
    """The folder of the package that ``import sglang`` would find, wheel or editable; None if there is none."""
    try:
        spec = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.submodule_search_locations:
        return None  # a folder without __init__.py, such as ours, is not SGLang
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def release_of(folder: pathlib.Path) -> str:
    """The release as SGLang itself would say it, "of unknown version" if it does not."""
    for file in ("_version.py", "version.py"):
        if (folder / file).is_file():
            said = re.search(r"^__version__\b[^\n]*= *['\"]([^'\"]+)['\"]", (folder / file).read_text(), re.MULTILINE)
            if said:
                return said.group(1)
    beside = importlib.metadata.distributions(name="sglang", path=[str(folder.parent)])
    for distribution in (*beside, *importlib.metadata.distributions(name="sglang")):
        return str(distribution.version)
    return "of unknown version"


def examine(folder: pathlib.Path) -> PatchPoints:
    """Reads the release whose package ``sglang`` is this folder. Takes some tenths of a second."""
    return _Examination(folder).result()


# Reading files.


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """``self.name = value`` in a method."""

    owner: str
    name: str
    value: ast.expr
    function: str
    line: int
    prefill: bool


@dataclasses.dataclass(frozen=True)
class _Use:
    """A place where the blacklist is used; ``kept`` says how it gets a second name, empty if it does not.

    ``of_self`` is the class whose own attribute it is there, empty for that of another object.
    """

    of_self: str
    function: str
    line: int
    locked: bool
    writer: str
    kept: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A place where a method is called, or handed on to be called later."""

    name: str
    function: str
    called: bool
    locked: bool


class _File(ast.NodeVisitor):
    """What one file says: who assigns an attribute, who uses the blacklist, and whether with the lock held."""

    def __init__(self, path: pathlib.Path, tree: ast.Module) -> None:
        self.path = path
        self.assignments: list[_Assignment] = []
        self.uses: list[_Use] = []
        self.references: list[_Reference] = []
        self.handles_lock: set[str] = set()
        self._above: list[ast.AST] = []
        self._owner = ""
        self._function = ""
        self._locked = False
        self._prefill = True
        self.visit(tree)

    def visit(self, node: ast.AST) -> None:
        self._above.append(node)
        super().visit(node)
        self._above.pop()

    def _visit_all(self, nodes: list[ast.stmt], locked: bool, prefill: bool) -> None:
        before = self._locked, self._prefill
        self._locked, self._prefill = locked, prefill
        for node in nodes:
            self.visit(node)
        self._locked, self._prefill = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._owner = self._owner, node.name
        self.generic_visit(node)
        self._owner = before

    def visit_FunctionDef(self, node: Function) -> None:
        before = self._function
        self._function = f"{before}.{node.name}" if before else node.name
        self._visit_all(node.body, False, self._prefill)
        self._function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item)
        takes_lock = any(getattr(item.context_expr, "attr", "") == _LOCK for item in node.items)
        self._visit_all(node.body, self._locked or takes_lock, self._prefill)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        role = _role_asked_for(node.test)
        self._visit_all(node.body, self._locked, self._prefill and role != "DECODE")
        self._visit_all(node.orelse, self._locked, self._prefill and role != "PREFILL")

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assigned(target, node.value)
            if getattr(target, "attr", "") == _BLACKLIST and len(node.targets) > 1:
                others = [other for other in node.targets if other is not target]
                kept = _second_name(others)
                self.uses.append(_Use(self._self_of(target), self._function, node.lineno, self._locked, "", kept))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assigned(node.target, node.value)
        self.generic_visit(node)

    def _assigned(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value] * len(target.elts)
            for each, its_value in zip(target.elts, values, strict=False):
                self._assigned(each, its_value)
        elif isinstance(target, ast.Attribute):
            self.assignments.append(
                _Assignment(self._owner, target.attr, value, self._function, target.lineno, self._prefill)
            )

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if getattr(node.target, "attr", "") == _BLACKLIST:
            self.uses.append(_Use(self._self_of(node.target), self._function, node.lineno, self._locked, "update", ""))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        if getattr(node.func, "id", "") == "getattr" and names == [_BLACKLIST]:
            self._used(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            called = getattr(self._above[-2], "func", None) is node
            self.references.append(_Reference(node.attr, self._function, called, called and self._locked))
            if node.attr == _BLACKLIST:
                self._used(node)
            if node.attr == _LOCK and not isinstance(self._above[-2], (ast.With, ast.withitem)):
                self.handles_lock.add(self._function)  # acquire() and release(), or a name of its own
        self.generic_visit(node)

    def _used(self, node: ast.expr) -> None:
        writer, kept = _use_of(self._above)
        self.uses.append(_Use(self._self_of(node), self._function, node.lineno, self._locked, writer, kept))

    def _self_of(self, node: ast.expr) -> str:
        return self._owner if getattr(getattr(node, "value", None), "id", "") == "self" else ""


def _role_asked_for(test: ast.expr) -> str:
    """PREFILL or DECODE if the test is ``... == ....PREFILL`` or so, empty for any other."""
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Eq, ast.Is)) and len(test.ops) == 1:
        for side in (test.left, *test.comparators):
            if isinstance(side, ast.Attribute) and side.attr in ("PREFILL", "DECODE"):
                return side.attr
    return ""


def _use_of(above: list[ast.AST]) -> tuple[str, str]:
    """Which method of the set is called, and how the set gets a second name; the last node is the set itself."""
    *_, beyond, parent, node = above
    if isinstance(parent, ast.Attribute):
        called = isinstance(beyond, ast.Call) and beyond.func is parent
        return (parent.attr if parent.attr in _WRITERS else "", "") if called else ("", f"its {parent.attr} is kept")
    if isinstance(parent, (ast.BoolOp, ast.keyword)) or (isinstance(parent, ast.IfExp) and parent.test is not node):
        return _use_of(above[:-1])
    if isinstance(parent, ast.Call):
        return "", "" if _only_looks(parent.func) else f"it is passed on to {ast.unparse(parent.func)}"
    if isinstance(parent, (*_LOOKING_NODES, ast.IfExp)):
        return "", ""
    if isinstance(parent, (ast.Return, ast.Yield)):
        return "", "it is returned"
    return "", _second_name(parent.targets if isinstance(parent, ast.Assign) else [getattr(parent, "target", None)])


def _second_name(targets: Sequence[Optional[ast.AST]]) -> str:
    are_attributes = any(isinstance(target, ast.Attribute) for target in targets)
    return _SECOND_ATTRIBUTE if are_attributes else "it gets a second name"


def _only_looks(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _LOOKS
    if not isinstance(function, ast.Attribute):
        return False
    receiver = getattr(function.value, "id", getattr(function.value, "attr", ""))
    return function.attr == "join" or receiver.endswith(("logger", "logging"))


@dataclasses.dataclass(frozen=True)
class _Class:
    module: str
    path: pathlib.Path
    node: ast.ClassDef

    def methods(self) -> dict[str, Function]:
        return {node.name: node for node in self.node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


class _Release:
    """The modules of a release, parsed when they are asked for."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._trees: dict[pathlib.Path, Optional[ast.Module]] = {}

    def path(self, module: str) -> pathlib.Path:
        place = self.folder.joinpath(*module.split(".")[1:])
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

    def tree(self, module: str) -> Optional[ast.Module]:
        """None if the module is not there, or cannot be read by this Python."""
        return self.tree_of(self.path(module))

    def tree_of(self, path: pathlib.Path) -> Optional[ast.Module]:
        """The same of a file."""
        if path not in self._trees:
            self._trees[path] = _parsed(path)
        return self._trees[path]

    def classes(self, module: str, name: str) -> list[_Class]:
        """The class and, after it, those of its base classes that are SGLang's."""
        tree = self.tree(module) if module.split(".")[0] == "sglang" else None
        for node in _statements(tree.body) if tree else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                bases = [each for base in node.bases for each in self.classes(module, ast.unparse(base))]
                return [_Class(module, self.path(module), node), *bases]
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.classes(_imported_from(module, node), alias.name)
        return []


def _parsed(path: pathlib.Path) -> Optional[ast.Module]:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, branches included."""
    for node in body:
        yield node
        for branch in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _statements(getattr(node, branch, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _imported_from(module: str, node: ast.ImportFrom) -> str:
    parents = module.split(".")[: -node.level] if node.level else []
    return ".".join([*parents, *([node.module] if node.module else [])])


def _bound(statements: Iterator[ast.stmt] | list[ast.stmt]) -> dict[str, tuple[str, int]]:
    """The names that statements bind: where each is imported from, empty if it is made here, and the line."""
    names: dict[str, tuple[str, int]] = {}
    for node in statements:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] = "", node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)):
                names[name.id] = "", node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = f"{origin}{alias.name}", node.lineno
    return names


# What the patch needs.


class _Examination:
    """Goes through one release and notes what is there."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._release = _Release(folder)
        self._findings: list[Finding] = []
        self._missing: list[str] = []
        self._doubts: list[str] = []

    def result(self) -> PatchPoints:
        """All that can be said of it."""
        if self._look_for_manager():
            self._look_for_free_names(_CONN)
        self._look_for_engine()
        self._look_for_settings()
        plugins = self._release.path(_PLUGINS)
        has_plugins = plugins.is_file() and _PLUGINS in plugins.read_text()
        self._note("plugins", plugins if has_plugins else None, needed=False)
        return PatchPoints(release_of(self._folder), tuple(self._missing), tuple(self._doubts), tuple(self._findings))

    def _note(self, name: str, path: Optional[pathlib.Path], line: int = 1, needed: bool = True) -> None:
        where = f"{path.relative_to(self._folder.parent)}:{line}" if path else ""
        self._findings.append(Finding(name, bool(path), where, needed))

    def _need(self, name: str, missing: str, path: Optional[pathlib.Path], line: int = 1) -> None:
        """Notes it, and that it is missing if there is no path."""
        self._note(name, path, line)
        if path is None:
            self._missing.append(missing)

    def _doubt(self, name: str, doubt: str, path: pathlib.Path, line: int) -> None:
        where = f"{path.relative_to(self._folder.parent)}:{line}"
        self._findings.append(Finding(name, False, where))
        self._doubts.append(f"{doubt} ({where})")

    def _look_for_manager(self) -> bool:
        there, path = self._release.tree(_CONN) is not None, self._release.path(_CONN)
        self._need(_CONN, f"{_CONN} that can be read" if path.is_file() else _CONN, path if there else None)
        if not there:
            return False
        classes = self._release.classes(_CONN, _MANAGER)
        line = classes[0].node.lineno if classes else 1
        self._need(_MANAGER, f"{_CONN}.{_MANAGER}", classes[0].path if classes else None, line)
        if classes:
            self._look_for_role(classes)
            self._look_for_attributes(classes)
            own = classes[0].methods()
            for name, methods in (
                ("native probe", ("_failed_session_probe_loop", "_run_one_probe_pass")),
                ("teardown", ("teardown",)),
            ):
                found = all(method in own for method in methods)
                line = own[methods[0]].lineno if found else 1
                self._note(name, classes[0].path if found else None, line, needed=False)
        return True

    def _look_for_role(self, classes: list[_Class]) -> None:
        for each in classes:
            init = each.methods().get("__init__")
            if init is not None:
                names = [argument.arg for argument in (*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs)]
                path = each.path if _ROLE in names else None
                self._need(_ROLE, f"{_MANAGER}.__init__(..., {_ROLE}, ...)", path, init.lineno)
                return
        self._need(_ROLE, f"{_MANAGER}.__init__(..., {_ROLE}, ...)", None)

    def _look_for_attributes(self, classes: list[_Class]) -> None:
        files = self._files(classes)
        owners = {(each.path, each.node.name) for each in classes}
        made: dict[str, list[tuple[_File, _Assignment]]] = {}
        for file in files:
            for assignment in file.assignments:
                if (file.path, assignment.owner) in owners and assignment.prefill:
                    made.setdefault(assignment.name, []).append((file, assignment))
        for name in ("engine", _BLACKLIST, "session_failures", _LOCK):
            first_file, first = made.get(name, [(None, None)])[0]
            line = first.line if first else 1
            self._need(name, f"{_MANAGER}.{name}", first_file.path if first_file else None, line)
            if first and first_file:
                self._look_at_kind(name, first, first_file)
        if _BLACKLIST in made:
            self._look_for_rebinding(files, made[_BLACKLIST])
            self._look_at_uses(files, owners, locks=_LOCK in made)

    def _files(self, classes: list[_Class]) -> list[_File]:
        """Those of the manager's class and its base classes, and those beside them that speak of the blacklist."""
        paths = [each.path for each in classes]
        for path in sorted(self._folder.glob("srt/disaggregation/**/*.py")):
            if _BLACKLIST in path.read_text(errors="replace"):
                paths.append(path)
        return [_File(path, tree) for path in dict.fromkeys(paths) if (tree := self._release.tree_of(path))]

    def _look_at_kind(self, name: str, made: _Assignment, file: _File) -> None:
        """Is the attribute of the kind that the patch counts on?"""
        said = ast.unparse(made.value)
        short = said if len(said) <= 40 else f"{said[:40]}..."
        if name == _BLACKLIST and not self._is_set(made.value, file):
            self._missing.append(f"set {_MANAGER}.{name} (it is a {'dict' if said == '{}' else short})")
        elif name == "session_failures" and not re.match(r"(\w+\.)*(defaultdict|dict|Counter)\(|\{", said):
            self._doubt("session_failures is a dict", f"{_MANAGER}.{name} is no dict but {short}", file.path, made.line)
        elif name == _LOCK and not re.fullmatch(r"(threading\.)?R?Lock\(\)", said):
            doubt = f"{_MANAGER}.{name} is no threading.Lock() but {short}"
            self._doubt("session_lock is a lock", doubt, file.path, made.line)

    def _is_set(self, value: ast.expr, file: _File) -> bool:
        if isinstance(value, (ast.Set, ast.SetComp)):
            return True
        kind = getattr(value.func, "id", "") if isinstance(value, ast.Call) else ""
        module = ".".join(["sglang", *file.path.relative_to(self._folder).with_suffix("").parts])
        bases = [ast.unparse(base) for each in self._release.classes(module, kind) for base in each.node.bases]
        return any(re.match(r"set\b|Set\b", name) for name in (kind, *bases))

    def _look_for_rebinding(self, files: list[_File], made: list[tuple[_File, _Assignment]]) -> None:
        at_start = _called_by("__init__", files)
        for file, assignment in made:
            if assignment.function not in at_start:
                doubt = f"{_MANAGER}.{_BLACKLIST} is made anew in {assignment.function}, without the probe"
                self._doubt("failed_sessions is never rebound", doubt, file.path, assignment.line)
                return
        self._note("failed_sessions is never rebound", made[0][0].path, made[0][1].line)

    def _look_at_uses(self, files: list[_File], owners: set[tuple[pathlib.Path, str]], locks: bool) -> None:
        held = _called_with_lock(files)
        at_start = _called_by("__init__", files)
        uses = [
            (file, use)
            for file in files
            for use in file.uses
            if not use.of_self or (file.path, use.of_self) in owners  # else it is another class's own
        ]
        for file, use in uses:
            if use.kept == _SECOND_ATTRIBUTE and use.of_self and use.function in at_start:
                if (missing := f"{_MANAGER}.{_BLACKLIST} without a second name") not in self._missing:
                    self._need("failed_sessions has no second name", missing, None)
            elif use.kept:
                doubt = f"{use.function} keeps {_MANAGER}.{_BLACKLIST}: {use.kept}, which the probe does not follow"
                self._doubt("failed_sessions has no second name", doubt, file.path, use.line)
            elif locks and not use.locked and use.function not in held | file.handles_lock:
                doubt = f"{use.function} uses {_MANAGER}.{_BLACKLIST} without {_LOCK}"
                self._doubt("failed_sessions is used under session_lock", doubt, file.path, use.line)
            elif use.writer:
                self._note(f"failed_sessions: {use.writer} in {use.function}", file.path, use.line)
        if not any(use.writer == "add" for _, use in uses):
            self._findings.append(Finding("failed_sessions: add", False, ""))
            self._doubts.append(f"nothing adds to {_MANAGER}.{_BLACKLIST}")

    def _look_for_free_names(self, module: str) -> None:
        """Our file runs in SGLang's module: a name that both give a meaning of their own is taken."""
        file = source_folder().joinpath(*module.split(".")).with_suffix(".py")
        ours, theirs = _parsed(file), self._release.tree(module)
        if ours is None or theirs is None:
            return
        there = _bound(_statements(theirs.body))
        for name, (origin, _) in _bound(ours.body).items():  # not what it binds only where SGLang has nothing
            if name in there and not (origin and there[name][0] == origin):
                self._findings.append(Finding("names are free", False, f"{file.name}:{there[name][1]}"))
                self._missing.append(f"free name {name} in {module}")

    def _look_for_engine(self) -> None:
        there = [module for module in (_ENGINE, _OLD_ENGINE) if self._release.tree(module) is not None]
        if not there:
            self._findings.append(Finding(_ENGINE_CLASS, False, ""))
            self._doubts.append(f"{_ENGINE_CLASS} is in neither of its two modules")
        for module in there:
            tree = self._release.tree(module)
            names = _bound(_statements(tree.body)) if tree else {}
            path = self._release.path(module) if _ENGINE_CLASS in names else None
            self._need(_ENGINE_CLASS, f"{module}.{_ENGINE_CLASS}", path, names.get(_ENGINE_CLASS, ("", 1))[1])
            self._look_for_free_names(module)

    def _look_for_settings(self) -> None:
        tree = self._release.tree(_ENVIRON)
        names = _bound(_statements(tree.body)) if tree else {}
        if "Envs" in names:
            for name in _FIELD_TYPES:
                path = self._release.path(_ENVIRON) if name in names else None
                self._need(name, f"{_ENVIRON}.{name}", path, names.get(name, ("", 1))[1])
            text = self._release.path(_ENVIRON).read_text()
            default = re.search(rf"^ *{SWITCH} *= *EnvBool\(True\)", text, re.MULTILINE)
            line = text.count("\n", 0, default.start()) + 1 if default else 1
            path = self._release.path(_ENVIRON) if default else None
            self._note(ON_BY_DEFAULT, path, line, needed=False)
        self._look_for_free_names(_ENVIRON)


def _called_by(start: str, files: list[_File]) -> set[str]:
    """The method ``start`` and those that are called by nothing but it and what it calls."""
    references = [reference for file in files for reference in file.references]
    reached = {start}
    while True:
        more = {
            name
            for name in {reference.name for reference in references if reference.function in reached} - reached
            if all(each.called and each.function in reached for each in references if each.name == name)
        }
        if not more:
            return reached
        reached |= more


def _called_with_lock(files: list[_File]) -> set[str]:
    """The methods that are called only where session_lock is held."""
    by_name: dict[str, list[_Reference]] = {}
    for file in files:
        for reference in file.references:
            by_name.setdefault(reference.name, []).append(reference)
    held: set[str] = set()
    while True:
        more = {
            name
            for name, references in by_name.items()
            if name not in held and all(each.locked or each.function in held for each in references)
        }
        if not more:
            return held
        held |= more
