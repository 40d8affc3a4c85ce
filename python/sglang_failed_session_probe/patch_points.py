"""Does the patch fit this SGLang? Reads the files of an unedited release; imports neither SGLang nor what it needs.

``missing`` is what the patch would refuse at run time with an ERROR line, in the same words; ``doubts`` is what looks
odd and may work. Who else uses the blacklist, and whether with the lock held, is not read here: the matrix runs every
stock release.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Optional

from sglang_failed_session_probe import SWITCH
from sglang_failed_session_probe.own_files import CONN, ENGINE, ENVIRON, OLD_ENGINE, PATCHED, file_of

_PLUGINS = "sglang.srt.plugins"
_MANAGER = PATCHED[CONN][1]
_ENGINE_CLASS = PATCHED[ENGINE][1]
_ROLE = "disaggregation_mode"
_BLACKLIST = "failed_sessions"
_THE_SET = f"self.{_BLACKLIST}"
_WRITERS = ("add", "update", "discard", "remove", "pop", "clear")
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Names = dict[str, tuple[str, ast.stmt]]
_ON_BY_DEFAULT = f"{SWITCH} is on by default"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked for; ``where`` is "file:line", empty where nothing was found."""

    name: str
    found: bool
    where: str
    needed: bool = True


@dataclasses.dataclass(frozen=True)
class PatchPoints:
    """What a release has of what the patch needs."""

    release: str
    missing: tuple[str, ...]
    doubts: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def fits(self) -> bool:
        return not self.missing and not self.doubts

    @property
    def native_default(self) -> str:
        """Is the native probe "on" or "off" by default? Empty if the release has none."""
        return ("on" if self.has(_ON_BY_DEFAULT) else "off") if self.has("native probe") else ""

    def has(self, name: str) -> bool:
        """True if what has this name was found, e.g. "native probe", "teardown" or "plugins"."""
        return any(finding.found for finding in self.findings if finding.name == name)


def find_sglang() -> Optional[pathlib.Path]:
    """The folder that ``import sglang`` would find, of a wheel or an editable install; None if there is none."""
    try:
        spec = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.submodule_search_locations:
        return None  # a folder without __init__.py, such as ours, is not SGLang
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def release_of(folder: pathlib.Path) -> str:
    """The release as SGLang itself would say it, "of unknown version" where it would not."""
    for file in ("_version.py", "version.py"):
        if (folder / file).is_file():
            said = re.search(
                r"^__version__\b[^\n]*= *['\"]([^'\"]+)['\"]", (folder / file).read_text(errors="replace"), re.MULTILINE
            )
            if said:
                return said.group(1)
    beside = importlib.metadata.distributions(name="sglang", path=[str(folder.parent)])
    for distribution in (*beside, *importlib.metadata.distributions(name="sglang")):
        return str(distribution.version)
    return "of unknown version"


def examine(folder: pathlib.Path) -> PatchPoints:
    """Reads the package ``sglang`` in this folder. Takes some tenths of a second."""
    return _Examination(folder).result()


# Reading code.


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported, branches included."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.ClassDef | _Function):
            yield from _at_import(child)


def _on_prefill(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but not the branches that only a DECODE manager runs."""
    yield node
    left_out: list[ast.stmt] = []
    if isinstance(node, ast.If) and (asked := re.search(r" (?:==|is) .*\.(PREFILL|DECODE)$", ast.unparse(node.test))):
        left_out = node.orelse if asked.group(1) == "PREFILL" else node.body
    for child in ast.iter_child_nodes(node):
        if child not in left_out:
            yield from _on_prefill(child)


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment, each with its value."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def _bound(statements: Iterable[ast.AST]) -> _Names:
    """The names that statements bind: where each is imported from, empty if it is made here, and the statement."""
    names: _Names = {}
    for node in statements:
        if isinstance(node, ast.ClassDef | _Function):
            names.setdefault(node.name, ("", node))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = [each for target, _ in _assigned(node) for each in ast.walk(target)]
            names = {each.id: ("", node) for each in targets if isinstance(each, ast.Name)} | names
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                names.setdefault(alias.asname or alias.name.split(".")[0], (f"{module}{alias.name}", node))
    return names


# What the patch needs.


class _Examination:
    """Looks in one release for everything that the patch needs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._trees: dict[str, Optional[ast.Module]] = {}
        self._findings: list[Finding] = []
        self._missing: list[str] = []
        self._doubts: list[str] = []

    def result(self) -> PatchPoints:
        self._look_for_manager()
        self._look_for_engine()
        self._look_for_settings()
        self._note("plugins", self._where(_PLUGINS) if self._tree(_PLUGINS) else "", needed=False)
        return PatchPoints(release_of(self._folder), tuple(self._missing), tuple(self._doubts), tuple(self._findings))

    def _path(self, module: str) -> pathlib.Path:
        place = self._folder.joinpath(*module.split(".")[1:])
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

    def _tree(self, module: str) -> Optional[ast.Module]:
        """None if there is no such module, or this Python cannot parse it."""
        if module not in self._trees:
            self._trees[module] = None
            with contextlib.suppress(OSError, SyntaxError, ValueError):
                self._trees[module] = ast.parse(self._path(module).read_bytes())
        return self._trees[module]

    def _names(self, module: str) -> _Names:
        tree = self._tree(module) if module.startswith("sglang.") else None
        return _bound(_at_import(tree)) if tree else {}

    def _classes(self, module: str, name: str) -> list[tuple[str, ast.ClassDef]]:
        """The class and its module, then the same for its base classes as far as they are SGLang's."""
        origin, node = self._names(module).get(name, ("", None))
        if isinstance(node, ast.ClassDef):
            return [(module, node), *(each for base in node.bases for each in self._classes(module, ast.unparse(base)))]
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            return self._classes(source, origin.rpartition(".")[2])
        return []

    def _where(self, module: str, node: Optional[ast.stmt | ast.expr] = None) -> str:
        return f"{self._path(module).relative_to(self._folder.parent)}:{node.lineno if node else 1}"

    def _note(self, name: str, where: str, missing: str = "", needed: bool = True) -> None:
        """Notes where something is; if it is nowhere (""), ``missing`` says what is missing, if that matters."""
        self._findings.append(Finding(name, bool(where), where, needed))
        if missing and not where:
            self._missing.append(missing)

    def _doubt(self, doubt: str, where: str = "") -> None:
        self._findings.append(Finding(doubt, False, where))
        self._doubts.append(f"{doubt} ({where})" if where else doubt)

    def _look_for_name(self, module: str, name: str) -> None:
        _, node = self._names(module).get(name, ("", None))
        self._note(name, self._where(module, node) if node else "", f"{module}.{name}")

    def _look_for_free_names(self, module: str) -> None:
        """Our file runs in SGLang's module, so no name may mean one thing there and another in our file."""
        theirs = self._names(module)
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # doctor says which file of ours is broken
            ours = ast.parse(file_of(PATCHED[module][0]).read_bytes())
            for name, (origin, _) in _bound(ours.body).items():  # what stands in branches is for use without SGLang
                if name in theirs and not (origin and theirs[name][0] == origin):
                    self._findings.append(Finding("names are free", False, self._where(module, theirs[name][1])))
                    self._missing.append(f"free name {name} in {module}")

    def _look_for_manager(self) -> None:
        missing = f"{CONN} that can be read" if self._path(CONN).is_file() else CONN
        self._note(CONN, self._where(CONN) if self._tree(CONN) else "", missing)
        if self._missing:
            return
        self._look_for_name(CONN, _MANAGER)
        classes = self._classes(CONN, _MANAGER)
        methods = [(module, node) for module, each in classes for node in each.body if isinstance(node, _Function)]
        if classes:
            inits = [(module, node) for module, node in methods if node.name == "__init__"][:1]
            takers = [self._where(*each) for each in inits if _ROLE in re.findall(r"\w+", ast.unparse(each[1].args))]
            self._note(_ROLE, "".join(takers), f"{_MANAGER}.__init__(..., {_ROLE}, ...)")
            self._look_for_attributes(methods)
            own = {node.name: self._where(module, node) for module, node in methods if module == CONN}
            self._note("native probe", own.get("_failed_session_probe_loop", ""), needed=False)
            self._note("teardown", own.get("teardown", ""), needed=False)
        self._look_for_free_names(CONN)

    def _look_for_attributes(self, methods: list[tuple[str, _Function]]) -> None:
        made: dict[str, list[tuple[str, str, ast.expr]]] = {}  # by attribute: module, method, value
        has_second_name = False
        for module, method in methods:
            for node in _on_prefill(method):
                for target, value in _assigned(node):
                    owner, _, name = ast.unparse(target).rpartition(".")
                    if owner == "self":
                        made.setdefault(name, []).append((module, method.name, value))
                if isinstance(node, ast.Assign) and method.name == "__init__":
                    same = [each for each in (*node.targets, node.value) if isinstance(each, ast.Attribute)]
                    has_second_name |= len(same) > 1 and _THE_SET in map(ast.unparse, same)
        for name in ("engine", _BLACKLIST, "session_failures", "session_lock"):
            for module, _, value in made.get(name, [])[:1]:
                self._look_at_kind(name, module, value)
            if name not in made:
                self._note(name, "", f"{_MANAGER}.{name}")
        if has_second_name:
            self._note(f"{_BLACKLIST} has no second name", "", f"{_MANAGER}.{_BLACKLIST} without a second name")
        for module, method_name, value in made.get(_BLACKLIST, []):
            if method_name != made[_BLACKLIST][0][1]:
                self._doubt(f"{_MANAGER}.{_BLACKLIST} is made anew in {method_name}", self._where(module, value))
        if _BLACKLIST in made:
            self._look_for_writers(methods)

    def _look_for_writers(self, methods: list[tuple[str, _Function]]) -> None:
        is_filled = False
        for module, method in methods:
            for node in _on_prefill(method):
                if isinstance(node, ast.Attribute) and node.attr in _WRITERS and ast.unparse(node.value) == _THE_SET:
                    self._note(f"{_BLACKLIST}: {node.attr} in {method.name}", self._where(module, node))
                    is_filled |= node.attr in ("add", "update")
        if not is_filled:
            self._doubt(f"nothing adds to {_MANAGER}.{_BLACKLIST}")

    def _look_at_kind(self, name: str, module: str, value: ast.expr) -> None:
        """Is the attribute of the kind that the patch relies on?"""
        said, where = ast.unparse(value), self._where(module, value)
        self._note(name, where)
        kind = "dict" if said == "{}" else said.partition("(")[0]
        bases = [ast.unparse(base) for _, each in self._classes(module, kind) for base in each.bases]
        if name == _BLACKLIST and not any(re.match(r"(\w+\.)*[sS]et\b", each) for each in (kind, *bases)):
            self._missing.append(f"set {_MANAGER}.{name} (it is a {kind.rpartition('.')[2]})")
        elif name == "session_failures" and not re.match(r"(\w+\.)*(defaultdict|dict|Counter)\b", kind):
            self._doubt(f"{_MANAGER}.{name} is no dict but {said}", where)
        elif name == "session_lock" and not re.fullmatch(r"(threading\.)?R?Lock", kind):
            self._doubt(f"{_MANAGER}.{name} is no threading.Lock() but {said}", where)

    def _look_for_engine(self) -> None:
        there = [module for module in (ENGINE, OLD_ENGINE) if self._tree(module)]
        for module in there:
            self._look_for_name(module, _ENGINE_CLASS)
            self._look_for_free_names(module)
        if not there:
            self._doubt(f"{_ENGINE_CLASS} is in neither of its two modules")

    def _look_for_settings(self) -> None:
        _, envs = self._names(ENVIRON).get("Envs", ("", None))
        if envs:
            for name in ("EnvBool", "EnvFloat", "EnvInt"):
                self._look_for_name(ENVIRON, name)
            on = [each for each in getattr(envs, "body", []) if ast.unparse(each) == f"{SWITCH} = EnvBool(True)"]
            self._note(_ON_BY_DEFAULT, self._where(ENVIRON, on[0]) if on else "", needed=False)
        self._look_for_free_names(ENVIRON)
