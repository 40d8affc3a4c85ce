"""Does the patch fit this SGLang? Reads the files of an unedited release; imports neither SGLang nor what it needs.

What the patch refuses at run time with an ERROR line is ``missing`` here, in the same words, where the code leaves no
doubt. ``doubts`` are the rest. How each place uses the blacklist, and whether with the lock held, is not looked at: the
tests on every stock release see that.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Iterator
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
_FIELD_TYPES = ("EnvBool", "EnvFloat", "EnvInt")

_WRITERS = frozenset(
    name for name in dir(set) if name in ("add", "discard", "remove", "clear", "pop") or "update" in name
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


class _Attributes(ast.NodeVisitor):
    """What the methods of a class do with attributes of ``self``, without what only a DECODE manager does."""

    def __init__(self, node: ast.ClassDef) -> None:
        self.made: dict[str, ast.expr] = {}  # by name: the first value that is assigned
        self.writes: list[tuple[str, str, int]] = []  # of the blacklist: the set's method, ours, the line
        self.has_second_name = False  # given to the blacklist by the constructor
        self._function = ""
        for statement in node.body:
            self.visit(statement)

    def visit_FunctionDef(self, node: Function) -> None:
        before = self._function
        self._function = f"{before}.{node.name}" if before else node.name
        self.generic_visit(node)
        self._function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        role = _role_asked_for(node.test)
        for statement in (*(node.body if role != "DECODE" else ()), *(node.orelse if role != "PREFILL" else ())):
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assigned(target, node.value)
        of_two = len(node.targets) > 1 and any(map(_is_blacklist, node.targets))
        to_attribute = any(isinstance(target, ast.Attribute) for target in node.targets)
        if self._function == "__init__" and (of_two or (to_attribute and _is_blacklist(node.value))):
            self.has_second_name = True
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
        elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
            self.made.setdefault(target.attr, value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if _is_blacklist(node.target):
            self.writes.append(("update", self._function, node.lineno))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in _WRITERS and _is_blacklist(called.value):
            self.writes.append((called.attr, self._function, node.lineno))
        self.generic_visit(node)


def _is_blacklist(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == _BLACKLIST


def _role_asked_for(test: ast.expr) -> str:
    """PREFILL or DECODE if the test is ``... == ....PREFILL`` or so, empty for any other."""
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Eq, ast.Is)) and len(test.ops) == 1:
        for side in (test.left, *test.comparators):
            if isinstance(side, ast.Attribute) and side.attr in ("PREFILL", "DECODE"):
                return side.attr
    return ""


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
        path = self.path(module)
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
        attributes = [(each, _Attributes(each.node)) for each in classes]
        for name in ("engine", _BLACKLIST, "session_failures", _LOCK):
            makers = [(each.path, its.made[name]) for each, its in attributes if name in its.made]
            path, value = makers[0] if makers else (None, None)
            self._need(name, f"{_MANAGER}.{name}", path, value.lineno if value else 1)
            if path and value:
                self._look_at_kind(name, value, path)
        if any(its.has_second_name for _, its in attributes):
            self._need("failed_sessions has no second name", f"{_MANAGER}.{_BLACKLIST} without a second name", None)
        writes = [(each.path, *write) for each, its in attributes for write in its.writes]
        for path, method, function, line in writes:
            self._note(f"failed_sessions: {method} in {function}", path, line)
        if any(_BLACKLIST in its.made for _, its in attributes) and not any(write[1] == "add" for write in writes):
            self._findings.append(Finding("failed_sessions: add", False, ""))
            self._doubts.append(f"nothing adds to {_MANAGER}.{_BLACKLIST}")

    def _look_at_kind(self, name: str, value: ast.expr, path: pathlib.Path) -> None:
        """Is the attribute of the kind that the patch counts on?"""
        said = ast.unparse(value)
        short = said if len(said) <= 40 else f"{said[:40]}..."
        if name == _BLACKLIST and not self._is_set(value, path):
            self._missing.append(f"set {_MANAGER}.{name} (it is a {'dict' if said == '{}' else short})")
        elif name == "session_failures" and not re.match(r"(\w+\.)*(defaultdict|dict|Counter)\(|\{", said):
            self._doubt("session_failures is a dict", f"{_MANAGER}.{name} is no dict but {short}", path, value.lineno)
        elif name == _LOCK and not re.fullmatch(r"(threading\.)?R?Lock\(\)", said):
            doubt = f"{_MANAGER}.{name} is no threading.Lock() but {short}"
            self._doubt("session_lock is a lock", doubt, path, value.lineno)

    def _is_set(self, value: ast.expr, path: pathlib.Path) -> bool:
        if isinstance(value, (ast.Set, ast.SetComp)):
            return True
        kind = getattr(value.func, "id", "") if isinstance(value, ast.Call) else ""
        module = ".".join(["sglang", *path.relative_to(self._folder).with_suffix("").parts])
        bases = [ast.unparse(base) for each in self._release.classes(module, kind) for base in each.node.bases]
        return any(re.match(r"set\b|Set\b", name) for name in (kind, *bases))

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
