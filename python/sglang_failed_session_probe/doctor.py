"""Is this environment ready for a prefill node with the probe, and if not, what is to be done?

Prints a line for each check, with what to do about it, and a last one that says what a prefill node started here will
do. The exit status is 0 if that is what was asked for, else 1. SGLang is not imported.

``--json`` prints one object:

    ready         true where the exit status is 0
    asked_for     whether the switch is on, null if it is not set
    verdict       the last line
    sglang        its release, null if there is none
    mooncake      name and release of the wheel whose engine is there, null if that is not known
    lines         a list of {"mark": "ok" | "info" | "warning" | "error", "subject", "finding", "do"}; "do" may be ""
    patch_points  a list of {"name", "found", "where": "file:line" or "", "needed"}
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional

from sglang_failed_session_probe import ON_WORDS, SWITCH, mooncake_wheels, patch_points, table
from sglang_failed_session_probe.mooncake_wheels import Wheel
from sglang_failed_session_probe.own_files import ENVIRON, file_of, load_settings
from sglang_failed_session_probe.patch_points import PatchPoints
from sglang_failed_session_probe.printable import printable

_DISTRIBUTION = "sglang-failed-session-probe"
_PACKAGE = "sglang_failed_session_probe"
_PTH = "sglang_failed_session_probe.pth"
_PLUGIN_GROUP = "sglang.srt.plugins"
_OUR_PREFIXES = ("SGLANG_FAILED_SESSION", "SGLANG_ENABLE_FAILED")
_INSTALL = "pip install sglang_failed_session_probe-*.whl"
_REINSTALL = "pip install --force-reinstall --no-deps sglang_failed_session_probe-*.whl"

# Debian calls the package of libnuma.so.1 libnuma1, and so on.
_MOONCAKE_LIBRARIES = ("libibverbs.so.1", "librdmacm.so.1", "libnuma.so.1", "libcurl.so.4")
_CHILD_DEADLINE_S = 20.0
_GREEN = 32
_LONGEST = 2000  # characters of a line

# What an error means for a prefill node, the worst first.
_STOPS = "will NOT start, because"
_NO_PROBE = "will NOT probe blacklisted sessions, because"
_UNSURE = "will perhaps NOT let healed sessions in, because"
_PARTLY = "will probe blacklisted sessions, but not as asked:"
_EFFECTS = (_STOPS, _NO_PROBE, _UNSURE, _PARTLY)


class Line(NamedTuple):
    """The result of one check. The finding of an error completes the sentence that its effect begins."""

    mark: str
    subject: str
    finding: str
    do: str = ""
    effect: str = _NO_PROBE


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that was found; ``asked_for`` says whether the switch is on, None if it is not set."""

    lines: tuple[Line, ...]
    asked_for: Optional[bool]
    points: Optional[PatchPoints]
    mooncake: Optional[str]

    @property
    def ready(self) -> bool:
        """True if a prefill node started here will do what was asked for."""
        return all(line.mark != "error" for line in self.lines)

    @property
    def verdict(self) -> str:
        """What a prefill node started here will do, in one sentence."""
        node = "A prefill node started here"
        errors = [line for line in self.lines if line.mark == "error"]
        if errors:
            worst = min(errors, key=lambda line: _EFFECTS.index(line.effect))
            node = node if self.asked_for else "Switched on, a prefill node started here"
            more = f" ({len(errors) - 1} more above)" if len(errors) > 1 else ""
            return f"{node} {worst.effect} {worst.finding}; do this: {worst.do}{more}."
        if self.asked_for:
            return f"{node} will probe blacklisted sessions."
        if self.asked_for is False:
            return f"{node} will probe no sessions, as {SWITCH} asks for."
        own = f", its own probe {self.points.native_default}" if self.points and self.points.native_default else ""
        on = f"run doctor with {SWITCH}=1 to see what one does with it"
        return f"{node} will run SGLang as it is{own}: the switch is not set; {on}."

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "ready": self.ready,
            "asked_for": self.asked_for,
            "verdict": self.verdict,
            "sglang": self.points.release if self.points else None,
            "mooncake": self.mooncake,
            "lines": [dict(zip(Line._fields[:4], line, strict=False)) for line in self.lines],
            "patch_points": [dataclasses.asdict(finding) for finding in self.points.findings] if self.points else [],
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Prints the diagnosis; returns 0 if the environment is ready, else 1."""
    found = diagnose(os.environ)
    if arguments.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _print(found)
    return 0 if found.ready else 1


def diagnose(environment: Mapping[str, str]) -> Diagnosis:
    """Makes all checks. Starts two short processes, and imports nothing of SGLang's or Mooncake's in this one."""
    folder = patch_points.find_sglang()
    points = patch_points.examine(folder) if folder else None
    settings = None
    with contextlib.suppress(OSError):  # a file of ours is missing, which the check of the package says
        settings = load_settings().FailedSessionProbeSettings
    switch, asked_for = _look_at_switch(environment, settings)
    mooncake, mooncake_lines = _look_at_mooncake(environment)
    lines = [
        *_look_at_sglang(folder, points),
        *mooncake_lines,
        _look_at_package(),
        *_look_at_doors(points, environment),
        *_look_at_libraries(points),
        switch,
        *(_look_at_settings(environment, asked_for, settings) if settings else ()),
        *(_look_at_misspelt(environment, asked_for, settings, folder) if settings else ()),
        _look_at_metrics_folder(environment, points),
        *([_BEHIND_A_ROUTER] if asked_for else []),
    ]
    misspelt = any(line.subject == "misspelt" and line.mark == "error" for line in lines)
    return Diagnosis(tuple(lines), asked_for if asked_for is not None or not misspelt else True, points, mooncake)


def _print(found: Diagnosis) -> None:
    colours = {"ok": _GREEN, "warning": table.YELLOW, "error": table.RED}
    width = max(len(line.subject) for line in found.lines)
    for line in found.lines:
        mark = table.coloured(f"{line.mark:<7}", colours.get(line.mark))
        print(f"{mark}  {line.subject:<{width}}  {printable(line.finding, _LONGEST)}")
        if line.do:
            print(f"{'':<7}  {'':<{width}}  do this: {printable(line.do, _LONGEST)}")
    print(printable(found.verdict, _LONGEST))


# SGLang.


def _look_at_sglang(folder: Optional[pathlib.Path], points: Optional[PatchPoints]) -> Iterator[Line]:
    if folder is None or points is None:
        do = "run doctor with the Python of the prefill node, or install SGLang"
        yield Line("error", "SGLang", f"{sys.executable} finds no SGLang", do, _STOPS)
        return
    if not (folder / "srt").is_dir():
        do = "start from another folder, or take it off PYTHONPATH"
        yield Line("error", "SGLang", f"{folder} is not SGLang and stands in front of it", do, _STOPS)
        return
    is_wheel = any(folder.parent.glob("sglang-*.dist-info"))
    how = "a wheel" if is_wheel else "editable or a source tree"
    yield Line("ok", "SGLang", f"{points.release}, {how}, in {folder}")
    here = pathlib.Path.cwd() / "sglang"
    if (here / "__init__.py").is_file() and here.resolve() != folder.resolve():
        finding = f"`python -m sglang.launch_server` in this folder would find {here} instead"
        yield Line("warning", "SGLang", finding, "start it from another folder")
    first_with_blacklist = "0.4.7"
    newer = f"look for a release of {_DISTRIBUTION} that supports it"
    if re.match(r"0\.[1-4]\.", points.release) and not _at_least(points.release, first_with_blacklist):
        newer = f"run it as it is: SGLang has the blacklist from {first_with_blacklist} on"
    if points.missing:
        yield Line("error", "patch points", f"SGLang {points.release} has no {', no '.join(points.missing)}", newer)
    for doubt in points.doubts:
        yield Line("error", "patch points", f"in SGLang {points.release} {doubt}", newer, _UNSURE)
    if points.fits:
        writers = dict.fromkeys(
            finding.name.split()[-1] for finding in points.findings if finding.name.startswith("failed_sessions: ")
        )
        yield Line("ok", "patch points", f"all found; the blacklist is written by {', '.join(writers)}")
    default = points.native_default
    native = f"{default} by default; ours takes its place while the switch is on" if default else "none"
    yield Line("info", "native probe", native)


# Mooncake.

# Uses our own code as a node does, without SGLang.
_CHILD_WITH_ENGINE = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
sys.path[:] = json.loads(sys.argv[1])
from sglang_failed_session_probe import own_files
own_files.leave_sglang_out()
from sglang.srt.disaggregation.mooncake import session_probe, tent_probe
print("our files are there", file=answers)
def can_probe():
    import mooncake.engine
    return session_probe.has_send_probe(mooncake.engine.TransferEngine)
try:
    answer = can_probe()
except BaseException as error:
    answer = f"{type(error).__name__}: {error}"
    if ".so" in answer:
        try:
            import torch  # as SGLang does before: it brings libraries of GPUs along
            answer = can_probe()
        except BaseException:
            pass
print(json.dumps(answer), file=answers)
print(json.dumps(session_probe.has_short_queue()), file=answers)
if answer is True and tent_probe.is_on():
    print(json.dumps(tent_probe.why_no_probe()), file=answers)
"""


def _look_at_mooncake(environment: Mapping[str, str]) -> tuple[Optional[str], list[Line]]:
    """Name and release of the wheel, None if not known, and the checks of Mooncake."""
    spec = importlib.util.find_spec("mooncake")
    places = spec and spec.submodule_search_locations
    folder = pathlib.Path(next(iter(places))) if places else None
    path = [*sys.path, *([str(folder.parent)] if folder else [])]
    child = _child(["-S", "-c", _CHILD_WITH_ENGINE, json.dumps(path)], environment)
    found_our_files, *answers = child.stdout.splitlines() or [""]
    engine = json.loads(answers[0]) if answers else _how_it_ended(child)
    if folder is None or not any(folder.glob("engine*")):
        finding = "Mooncake is not installed" if folder is None else f"{folder} has no engine"
        do = f"install the wheel of Mooncake for this machine, {mooncake_wheels.FIRST_MOONCAKE_WITH_PROBE} or later"
        return None, [Line("error", "Mooncake", finding, do, _STOPS)]
    wheels = [wheel for wheel in mooncake_wheels.wheels_beside(folder) if _engine_of(wheel)]
    wheel = _wheel_of_engine(wheels)
    lines = [_release_line(wheel, engine, environment)]
    if len(wheels) > 1:
        them = " and ".join(map(str, wheels))
        whose = f"the engine is that of {wheel}" if wheel else "the engine is none of theirs"
        finding = f"{len(wheels)} wheels of Mooncake lie over one another: {them}; {whose}"
        do = f"pip uninstall -y {' '.join(each.name for each in wheels)}, then install the one for this machine"
        effect = _UNSURE if lines[0].mark == "ok" else lines[0].effect
        lines.insert(0, Line("error", "Mooncake", finding, do, effect))
    if found_our_files:  # else it is our own files that are not there, which is said elsewhere
        lines.append(_engine_line(engine, wheel))
    if answers[1:2] == ["true"]:
        finding = (
            "over TCP, a burst of more than 1,024 blocks overflows this Mooncake's queue to a decode node, which then "
            "may not be reached any more until this node is started anew"
        )
        safe = mooncake_wheels.FIRST_MOONCAKE_WITH_SAFE_QUEUE
        do = f"set {mooncake_wheels.LONG_QUEUE}, or install Mooncake {safe} or later"
        lines.append(Line("warning", "queue", finding, do))
    lines += map(_tent_line, map(json.loads, answers[2:]))
    return str(wheel) if wheel else None, lines


def _child(arguments: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CHILD_DEADLINE_S,
        )
    except subprocess.TimeoutExpired as late:  # which has bytes, not text
        output, errors = (str(said or b"", errors="replace") for said in (late.stdout, late.stderr))
        return subprocess.CompletedProcess(command, -signal.SIGKILL, output, errors)


def _how_it_ended(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode == -signal.SIGKILL:
        return f"it takes more than {_CHILD_DEADLINE_S:.0f} s"
    return f"it ends the process with {signal.Signals(-child.returncode).name}" if child.returncode < 0 else "it exits"


def _files_of(distribution: importlib.metadata.Distribution) -> tuple[importlib.metadata.PackagePath, ...]:
    with contextlib.suppress(Exception):  # a RECORD that is no text, or none
        return tuple(distribution.files or ())
    return ()


def _engine_of(wheel: Wheel) -> list[importlib.metadata.PackagePath]:
    """The files of the engine that the wheel has brought."""
    files = _files_of(importlib.metadata.Distribution.at(wheel.metadata))
    return [file for file in files if file.parent.name == "mooncake" and file.match("engine*.so")]


def _wheel_of_engine(wheels: list[Wheel]) -> Optional[Wheel]:
    """The wheel that brought the engine that is there; None if none of them did."""
    if len(wheels) == 1:
        return wheels[0]
    return next((each for each in wheels if not _changed(_engine_of(each))), None)


def _changed(files: Iterable[importlib.metadata.PackagePath]) -> list[str]:
    """The files that are missing, or other than the wheel had them."""
    changed = []
    for file in files:
        if file.hash is not None:
            try:
                digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            except (OSError, KeyError, ValueError):  # KeyError: of a zip file; ValueError: no such hash
                digest = b""
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                changed.append(str(file))
    return changed


def _release_line(wheel: Optional[Wheel], engine: Any, environment: Mapping[str, str]) -> Line:
    name = str(wheel or "Mooncake of unknown release")
    release = wheel.release if wheel else "0"
    can_probe = engine if isinstance(engine, bool) else _at_least(release, mooncake_wheels.FIRST_MOONCAKE_WITH_PROBE)
    if not can_probe:
        answers = _at_least(release, mooncake_wheels.FIRST_MOONCAKE_THAT_ANSWERS)
        finding = f"{name} cannot send probes (it {'answers them' if answers else 'does not answer them either'})"
        do = (
            f"install Mooncake {mooncake_wheels.FIRST_MOONCAKE_WITH_PROBE} or later on the prefill nodes, "
            f"{mooncake_wheels.FIRST_MOONCAKE_THAT_ANSWERS} or later on the decode nodes"
        )
        return Line("error", "Mooncake", finding, do)
    if wheel and not _at_least(release, mooncake_wheels.FIRST_MOONCAKE_WITH_BOUND):
        finding = f"{name} sends and answers probes; where packets are dropped it waits two minutes to connect"
        return Line("warning", "Mooncake", finding, f"install {mooncake_wheels.FIRST_MOONCAKE_WITH_BOUND} or later")
    bound = environment.get("MC_HANDSHAKE_CONNECT_TIMEOUT") or "5"
    return Line("ok", "Mooncake", f"{name}: sends and answers probes, gives up connecting after {bound} s")


def _at_least(release: str, wanted: str) -> bool:
    """Compares releases by their numbers, which is enough for those of Mooncake and SGLang."""
    numbers, least = ([int(part) for part in re.findall(r"\d+", text)] for text in (release, wanted))
    return numbers >= least


def _engine_line(engine: Any, wheel: Optional[Wheel]) -> Line:
    """Can the engine be imported, and if not, what is missing? ``engine`` is a bool, or why it cannot be imported."""
    subject = "mooncake.engine"
    if isinstance(engine, bool):
        return Line("ok", subject, "can be imported")
    library = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file", engine)
    if library is None:
        anew = f"pip install --force-reinstall --no-deps {wheel.name}=={wheel.release}" if wheel else ""
        do = anew or "install Mooncake anew"
        return Line("error", subject, f"{subject} cannot be imported: {engine}", do, _STOPS)
    name = library.group(1)
    if name.startswith(("libcu", "libnv")):
        finding = f"{subject} needs {name}, which CUDA or the driver of a GPU brings and which is not here"
        do = "run doctor on the machine of the prefill node; if it says the same, install Mooncake's wheel for its CUDA"
        return Line("error", subject, finding, do, _UNSURE)
    missing = [file.replace(".so.", "") for file in _MOONCAKE_LIBRARIES if file == name or not _loads(file)]
    do = f"apt-get install {' '.join(missing)}" if missing else f"install what brings {name}"
    return Line("error", subject, f"{subject} needs {name}, which this system lacks", do, _STOPS)


def _tent_line(why_no_probe: str) -> Line:
    """What it means that Mooncake runs on TENT. ``why_no_probe``: what a probe did there, empty if probes are safe."""
    if why_no_probe:
        finding = f"Mooncake runs on TENT, where a probe {why_no_probe}: nothing is probed"
        return Line("error", "TENT", finding, mooncake_wheels.LEAVE_TENT)
    finding = "Mooncake runs on TENT, whose reads are not safe: sessions are let in when they answer probes"
    return Line("warning", "TENT", finding, f"{mooncake_wheels.UNSET_TENT}, if TENT is not needed")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# Our package and its ways in.


def _look_at_package() -> Line:
    here = pathlib.Path(__file__).parent
    if not file_of(ENVIRON).is_file():
        return Line("error", "package", f"in {here} the files for SGLang's modules are missing", _REINSTALL)
    try:
        installed = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Line("warning", "package", f"it is not installed, it is run from {here}", _INSTALL)
    home = _home_of(installed)
    if not here.resolve().is_relative_to(home):
        do = "start from another folder, or take the copy off PYTHONPATH"
        return Line("warning", "package", f"the copy in {here} is in front of the installed one, in {home}", do)
    if not (version := version_of(_DISTRIBUTION)):
        finding = f"what {home.parent} says of the installed package has no version"
        return Line("error", "package", finding, _REINSTALL)
    if changed := _changed(file for file in _files_of(installed) if file.parts[0] == _PACKAGE):
        finding = f"of the installed files these are not as they were: {', '.join(changed)}"
        return Line("error", "package", finding, _REINSTALL)
    return Line("ok", "package", f"{version}, in {here}")


def version_of(distribution: str) -> str:
    """The version of an installed distribution; empty if it is not there, or its metadata cannot be read."""
    with contextlib.suppress(Exception):
        return importlib.metadata.version(distribution) or ""
    return ""


def _home_of(installed: importlib.metadata.Distribution) -> pathlib.Path:
    """The folder that the installed package runs from: the checkout's where it is editable."""
    with contextlib.suppress(TypeError, ValueError, KeyError):  # no such file, or another format
        origin = json.loads(installed.read_text("direct_url.json"))  # type: ignore[arg-type]
        if origin["dir_info"]["editable"]:
            return pathlib.Path(origin["url"].removeprefix("file://")).resolve()
    return pathlib.Path(str(installed.locate_file(_PACKAGE))).resolve()


# Has the .pth file put a finder of ours there, and can what that needs be imported by then?
_CHILD_AT_THE_DOOR = f"""
import sys
ours = any(str(getattr(each, "__module__", "")).startswith("{_PACKAGE}") for each in sys.meta_path)
if ours:
    import {_PACKAGE}.patch
print(ours)
"""


def _look_at_doors(points: Optional[PatchPoints], environment: Mapping[str, str]) -> Iterator[Line]:
    try:
        plugin_shut = _why_plugin_is_shut(points, environment)
    except Exception as error:  # SGLang would raise the same
        finding = f"SGLang cannot read the entry points of this Python: {error}"
        do = f"reinstall the package of {' and of '.join(_broken_entry_points()) or 'one of them'}"
        yield Line("error", "plugin", finding, do, _STOPS)
        return
    pth_shut = _why_pth_is_shut(environment)
    if not plugin_shut:
        yield Line("ok", "plugin", f"SGLang will load us, by the entry point in {_PLUGIN_GROUP}")
    elif points and not points.has("plugins"):
        yield Line("info", "plugin", plugin_shut[0])  # nothing to do: the .pth file is there for it
    else:
        yield Line("warning" if not pth_shut else "error", "plugin", *plugin_shut)
    if not pth_shut:
        yield Line("ok", ".pth file", "every process of this Python will load us")
    elif not plugin_shut:
        why, do = pth_shut
        yield Line("warning", ".pth file", f"{why}; processes without plugins (Ray) stay as they are", do)
    else:
        yield Line("error", ".pth file", *pth_shut)


def _why_plugin_is_shut(points: Optional[PatchPoints], environment: Mapping[str, str]) -> Optional[tuple[str, str]]:
    """Why SGLang will not load us as a plugin, and what to do about it; None if it will."""
    if points and not points.has("plugins"):
        return f"SGLang {points.release} loads no plugins (0.5.11 and later do)", ""
    entries = importlib.metadata.entry_points(group=_PLUGIN_GROUP)
    ours = [entry.name for entry in entries if entry.value.split(":")[0] == _PACKAGE]
    if not ours:
        return f"there is no entry point of ours in {_PLUGIN_GROUP}", _INSTALL
    wanted = environment.get("SGLANG_PLUGINS", "")
    if wanted and ours[0] not in [name.strip() for name in wanted.split(",")]:
        return f"SGLANG_PLUGINS={wanted!r} leaves {ours[0]} out", f"set SGLANG_PLUGINS={wanted},{ours[0]}"
    return None


def _broken_entry_points() -> Iterator[str]:
    for folder in map(pathlib.Path, sys.path):
        for file in folder.glob("*-info/entry_points.txt"):
            try:
                file.read_text("utf-8")
            except (OSError, ValueError):
                yield str(file)


def _why_pth_is_shut(environment: Mapping[str, str]) -> Optional[tuple[str, str]]:
    """Why the .pth file does not load us, and what to do about it; None if a process started with the switch on is
    patched.
    """
    flags = {"-I": sys.flags.isolated, "-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site}
    started_with = [flag for flag, is_set in {**flags, "-S": sys.flags.no_site}.items() if is_set]
    child = _child([*started_with, "-c", _CHILD_AT_THE_DOOR], {**environment, SWITCH: "1"})
    if "True" in child.stdout.split():
        return None
    if sys.flags.no_site:
        return "this Python runs with -S and reads no .pth file", "start it without -S"
    files = [folder for folder in map(pathlib.Path, sys.path) if (folder / _PTH).is_file()]
    if not files:
        is_installed = any(importlib.metadata.distributions(name=_DISTRIBUTION))
        return f"{_PTH} is not there", _REINSTALL if is_installed else _INSTALL
    if f"{_PTH}:" in child.stderr or child.returncode > 0:
        why = [*re.findall(r"^ *([\w.]+: .+)$", child.stderr, re.MULTILINE), child.stderr.strip()][-2:][0]
        lacks = re.search(r"No module named '(\w+)'", why)
        repair = f"pip install {lacks.group(1)}" if lacks and lacks.group(1) != _PACKAGE else _REINSTALL
        return f"{files[0] / _PTH} fails: {why}", repair
    return f"{files[0]} is no folder whose .pth files this Python reads", _INSTALL


def _look_at_libraries(points: Optional[PatchPoints]) -> Iterator[Line]:
    counts = ("without it recoveries are not counted", _PARTLY)
    if points and points.native_default:
        counts = ("SGLang's own MooncakeKVManager needs it", _STOPS)
    needed = {
        "wrapt": ("register_post_import_hook", "without it the patch cannot be put into SGLang", _NO_PROBE),
        "prometheus_client": ("Counter", *counts),
    }
    for name, (attribute, why, effect) in needed.items():
        distribution = name.replace("_", "-")
        if importlib.util.find_spec(name) is None:
            yield Line("error", name, f"{name} is not installed: {why}", f"pip install {distribution}", effect)
            continue
        try:
            getattr(importlib.import_module(name), attribute)
        except Exception as problem:
            finding = f"{name} is here and cannot be used ({problem}): {why}"
            yield Line("error", name, finding, f"pip install --force-reinstall {distribution}", effect)
            continue
        release, newer = version_of(distribution), _newer_than_installed(distribution)
        if newer:
            finding = f"{release}, which is older than what this package is made for"
            yield Line("warning", name, finding, f"pip install '{newer}'")
        else:
            yield Line("ok", name, release or "can be imported")


def _newer_than_installed(distribution: str) -> str:
    """The requirement of our package that the installed version of a library is too old for; else empty."""
    release = version_of(distribution)
    with contextlib.suppress(Exception):
        for required in importlib.metadata.requires(_DISTRIBUTION) or ():
            oldest = re.fullmatch(rf"{distribution}>=([\d.]+)", required)
            if release and oldest and not _at_least(release, oldest.group(1)):
                return required
    return ""


# Settings.


def _look_at_switch(environment: Mapping[str, str], settings: Optional[Any]) -> tuple[Line, Optional[bool]]:
    value = environment.get(SWITCH, "").strip()
    if not value:
        return Line("info", SWITCH, "not set: SGLang stays as it is", f"set {SWITCH}=1 on the prefill nodes"), None
    enabled = value.lower() in ON_WORDS
    try:
        if settings:
            settings.from_environment({SWITCH: value})
    except ValueError as refused:
        return Line("error", SWITCH, str(refused).rstrip("."), f"set {SWITCH}=1", _STOPS), True
    return Line("ok" if enabled else "info", SWITCH, "on" if enabled else "off: no probe at all"), enabled


def _look_at_settings(environment: Mapping[str, str], asked_for: Optional[bool], settings: Any) -> Iterator[Line]:
    """The value of each setting and where it comes from, or the sentence with which a node would refuse it."""
    bad = "error" if asked_for else "warning"  # they are read only where the switch is on
    refused = False
    for variable, field in settings.by_variable().items():
        if variable == SWITCH:
            continue
        try:
            value = settings.read(field, environment)
        except ValueError as error:
            refused = True
            yield Line(bad, variable, str(error).rstrip("."), f"set {variable} to what is allowed, or unset it", _STOPS)
        else:
            shown = ("on" if value else "off") if isinstance(value, bool) else f"{value:g}"
            source = "environment" if environment.get(variable, "").strip() else "default"
            yield Line("ok", variable, f"{shown} ({source})")
    if not refused:
        try:
            settings.from_environment({**environment, SWITCH: ""})
        except ValueError as error:  # each is allowed, but not all of them together
            yield Line(bad, "settings", str(error).rstrip("."), "change one of the two", _STOPS)


def _look_at_misspelt(
    environment: Mapping[str, str], asked_for: Optional[bool], settings: Any, folder: Optional[pathlib.Path]
) -> Iterator[Line]:
    """Variables whose names are nearly those of our settings: nothing reads them."""
    known = list(settings.by_variable())
    with contextlib.suppress(OSError, TypeError):
        text = (folder / "srt/environ.py").read_text(errors="replace")  # type: ignore[operator]
        known += re.findall(r"\bSGLANG_\w*FAILED_SESSION\w*", text)
    for name in sorted(environment):
        if name in known or not name.upper().startswith("SGL"):
            continue
        is_ours = name.upper().startswith(_OUR_PREFIXES)
        meant = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.6 if is_ours else 0.85)
        if meant and meant[0] == SWITCH and asked_for is None:
            yield Line("error", "misspelt", f"nothing reads {name}", f"set {SWITCH} in its place")
        elif meant and meant[0] not in environment:
            mark = "error" if asked_for else "warning"
            yield Line(mark, "misspelt", f"nothing reads {name}", f"set {meant[0]} in its place", _PARTLY)
        elif meant or is_ours:
            yield Line("warning", "misspelt", f"nothing reads {name}", "unset it")


# The machine.


def _look_at_metrics_folder(environment: Mapping[str, str], points: Optional[PatchPoints]) -> Line:
    subject = "PROMETHEUS_MULTIPROC_DIR"
    folder = environment.get(subject, "")
    effect = _STOPS if points and points.native_default else _PARTLY
    if not folder:
        return Line("info", subject, "not set: SGLang makes a folder with --enable-metrics")
    if not os.path.isdir(folder):
        do = "make the folder before the node starts, or unset the variable"
        return Line("error", subject, f"{subject}={folder} is no folder, and metrics are kept there", do, effect)
    if not os.access(folder, os.W_OK):
        return Line("error", subject, f"this user cannot write to {subject}={folder}", "make it writable", effect)
    return Line("ok", subject, folder)


_BEHIND_A_ROUTER = Line(
    "info",
    "router",
    "cannot be seen from here; with sglang-router's defaults clients fail for up to a minute after a session is back",
    "start it with --retry-max-retries 40 --retry-max-backoff-ms 500 --cb-timeout-duration-secs 1 (docs/operations.md)",
)
