"""Does doctor name what is wrong with an environment, and say what a prefill node started there will do?"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest
from kit import changed_sglang
from kit.installations import install
from kit.releases import CHECKOUT, environment
from sglang_failed_session_probe import SWITCH, doctor
from small_environments import EVERYTHING, MOONCAKE, PROMETHEUS, SGLANG, WRAPT, Environment, add_wheel_record

from router import grid

ON = {SWITCH: "1"}
INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
MAX_INTERVAL = "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S"
SETTLE = "SGLANG_FAILED_SESSION_PROBE_SETTLE_S"
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
WILL_PROBE = "A prefill node started here will probe blacklisted sessions."
WILL_NOT = "A prefill node started here will NOT probe blacklisted sessions, because "
PERHAPS_NOT = "A prefill node started here will perhaps NOT let healed sessions in, because "
WILL_NOT_START = "A prefill node started here will NOT start, because "

Make = Callable[..., Environment]


# Nothing is wrong.


def test_where_nothing_is_wrong_it_says_that_a_prefill_node_will_probe(sound: Environment) -> None:
    report = sound.doctor(MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER="65535", **ON)
    assert (report.status, report.verdict) == (0, WILL_PROBE)
    assert [line for line in report.lines if line["mark"] in ("warning", "error")] == []
    assert (report.whole["sglang"], report.whole["mooncake"]) == (
        "0.5.23",
        f"{environment.MOONCAKE} {environment.MOONCAKE_VERSION}",
    )
    assert report.line("SGLang")["finding"].startswith("0.5.23, a wheel, in ")
    assert "_unblacklist_session" in report.line("patch points")["finding"]
    assert {finding["found"] for finding in report.whole["patch_points"]} == {True}


def test_with_the_switch_unset_it_says_that_it_is_off_and_that_is_no_fault(sound: Environment) -> None:
    report = sound.doctor()
    assert report.status == 0
    assert "SGLang as it is, its own probe on: the switch is not set" in report.verdict
    assert f"run doctor with {SWITCH}=1" in report.verdict
    assert (report.whole["asked_for"], sound.doctor(**ON).whole["asked_for"]) == (None, True)
    assert report.line(".pth file")["mark"] == "ok"
    assert sound.doctor(**{SWITCH: "off"}).verdict.endswith(f"will probe no sessions, as {SWITCH} asks for.")


def test_a_person_reads_the_same_lines_and_the_verdict_last(sound: Environment) -> None:
    began = time.monotonic()
    done = sound.run("-m", "sglang_failed_session_probe", "doctor", **ON)
    took_s = time.monotonic() - began
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, lines[-1]) == (0, "", WILL_PROBE)
    assert [line.split()[1] for line in lines[:-1] if line.startswith("ok")][:3] == ["SGLang", "patch", "Mooncake"]
    assert "\033" not in done.stdout
    assert took_s < 10, "an operator waits too long for an answer"


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_it_is_coloured_on_a_terminal_unless_no_color_is_set(
    variables: dict[str, str], coloured: bool, sound: Environment
) -> None:
    terminal, side = os.openpty()
    command = [sound.python, "-m", "sglang_failed_session_probe", "doctor"]
    said = b""
    with subprocess.Popen(command, stdout=side, cwd=sound.site, env={**os.environ, **variables}) as process:
        os.close(side)
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while part := os.read(terminal, 4096):
                said += part
        process.wait(60)
    os.close(terminal)
    assert b"patch points" in said
    assert (b"\033[32m" in said) == coloured


def test_it_imports_neither_sglang_nor_torch_nor_mooncake(sound: Environment) -> None:
    script = (
        "import os, sys; from sglang_failed_session_probe import doctor; doctor.diagnose(os.environ);"
        "print({'sglang', 'torch', 'mooncake'} & set(sys.modules))"
    )
    done = sound.run("-c", script, **ON)
    assert done.stdout == "set()\n", done.stderr


def test_no_process_of_it_imports_sglang(made: Make) -> None:
    here = made(MOONCAKE, WRAPT, PROMETHEUS)
    here.add("sglang/__init__.py", "raise SystemExit('SGLang was imported')")
    assert here.doctor(**ON).line("mooncake.engine")["mark"] == "ok"


@pytest.mark.parametrize("how", ["by finder", "by path"])
def test_an_editable_sglang_and_an_editable_package_of_ours_are_as_good(how: str, tmp_path: pathlib.Path) -> None:
    here = Environment(install("sglang-0.5.23", None, how, tmp_path).python)
    report = here.doctor(**ON)
    assert (report.verdict, report.errors) == (WILL_PROBE, [])
    assert report.line("SGLang")["finding"].startswith("0.5.23, editable")
    assert str(CHECKOUT) in report.line("package")["finding"]


@pytest.mark.parametrize("packages", [(), (SGLANG,), (SGLANG, MOONCAKE), (WRAPT, PROMETHEUS)])
def test_it_answers_whatever_is_missing(packages: tuple[str, ...], made: Make) -> None:
    report = made(*packages).doctor(**ON)
    assert report.status == 1
    assert report.verdict.startswith((WILL_NOT, WILL_NOT_START))


def test_the_keys_of_the_json_object_are_documented(sound: Environment) -> None:
    for key in (*sound.doctor().whole, "subject", "finding", "do", "needed"):
        assert key in (doctor.__doc__ or ""), f"nobody is told what {key} is"


# SGLang.


@pytest.mark.parametrize(
    ("release", "default"), [("0.5.23", "its own probe on"), ("0.5.13.post1", "its own probe off"), ("0.5.8.post1", "")]
)
def test_it_says_what_sglangs_own_probe_does_while_the_switch_is_unset(release: str, default: str, made: Make) -> None:
    verdict = made(*EVERYTHING, sglang=f"sglang-{release}").doctor().verdict
    assert f"will run SGLang as it is{default and ', '}{default}: the switch is not set" in verdict


def test_another_folder_of_that_name_in_front_of_sglang(made: Make, tmp_path: pathlib.Path) -> None:
    here = made(*EVERYTHING)
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    report = here.doctor(PYTHONPATH=str(tmp_path), **ON)
    assert report.verdict.startswith(f"{WILL_NOT_START}{tmp_path / 'sglang'} is not SGLang and stands in front of it")
    here.add("../../../bin/sglang/__init__.py", "")  # where it is started
    report = here.doctor("-I", **ON)
    assert "`python -m sglang.launch_server` in this folder" in report.line("SGLang")["finding"]
    assert report.verdict == WILL_PROBE


def test_an_sglang_that_has_no_blacklist_yet(sound: Environment, tmp_path: pathlib.Path) -> None:
    old = changed_sglang.Build({"version.py": {}, changed_sglang.CONN: {"failed_sessions": "other_sessions"}}, "")
    path = changed_sglang.make(old, sound.python, tmp_path)
    version = path / "sglang" / "_version.py"
    version.unlink()
    version.write_text("__version__ = '0.4.6.post5'")
    line = sound.doctor(PYTHONPATH=str(path), **ON).line("patch points")
    assert line["do"] == "run it as it is: SGLang has the blacklist from 0.4.7 on"


def test_an_sglang_whose_file_is_broken(sound: Environment, tmp_path: pathlib.Path) -> None:
    broken = changed_sglang.Build({changed_sglang.CONN: {r"class MooncakeKVManager": "class class"}}, "")
    line = sound.doctor(PYTHONPATH=str(changed_sglang.make(broken, sound.python, tmp_path)), **ON).line("patch points")
    assert "has no sglang.srt.disaggregation.mooncake.conn that can be read" in line["finding"]


def test_no_sglang_at_all(made: Make) -> None:
    report = made(MOONCAKE, WRAPT, PROMETHEUS).doctor(**ON)
    assert report.errors == ["SGLang"]
    assert report.verdict.startswith(WILL_NOT_START)
    assert "finds no SGLang; do this: run doctor with the Python of the prefill node" in report.verdict


@pytest.mark.parametrize("build", ["blacklist renamed", "lock renamed", "blacklist is a dict"])
def test_an_sglang_that_lacks_a_patch_point(build: str, sound: Environment, tmp_path: pathlib.Path) -> None:
    path = changed_sglang.make(changed_sglang.BUILDS[build], sound.python, tmp_path)
    report = sound.doctor(PYTHONPATH=str(path), **ON)
    assert report.errors == ["patch points"]
    assert report.verdict.startswith(f"{WILL_NOT}SGLang 0.5.23 has no ")
    assert changed_sglang.BUILDS[build].missing in report.verdict
    assert "look for a release of sglang-failed-session-probe that supports it" in report.verdict


def test_an_sglang_in_which_nothing_adds_to_the_blacklist(sound: Environment, tmp_path: pathlib.Path) -> None:
    idle = changed_sglang.Build({changed_sglang.CONN: {r"failed_sessions\.add\(": "failed_sessions.union("}}, "")
    report = sound.doctor(PYTHONPATH=str(changed_sglang.make(idle, sound.python, tmp_path)), **ON)
    assert report.status == 1
    assert "will perhaps NOT let healed sessions in, because in SGLang 0.5.23 nothing adds to" in report.verdict


# Mooncake.


def test_a_mooncake_that_cannot_probe(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    old = environment.with_wheel("sglang-0.5.12.post1+0.3.10.post2", wheel, tmp_path / "venv")
    report = Environment(old).doctor(**ON)
    assert report.errors == ["Mooncake"]
    assert report.verdict.startswith(f"{WILL_NOT}{environment.MOONCAKE} 0.3.10.post2 cannot send probes")
    assert "0.3.11 or later on the prefill nodes, 0.3.10.post2 or later on the decode nodes" in report.verdict


def test_no_mooncake(made: Make) -> None:
    report = made(SGLANG, WRAPT, PROMETHEUS).doctor(**ON)
    assert report.errors == ["Mooncake"]
    assert report.verdict.startswith(f"{WILL_NOT_START}Mooncake is not installed; do this: install the wheel")


@pytest.mark.parametrize(
    ("engine", "mark", "said"),
    [
        (
            "raise ImportError('libibverbs.so.1: cannot open shared object file: No such file or directory')",
            "error",
            ("libibverbs.so.1", "apt-get install libibverbs1"),
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "error", ("ends the process with SIGSEGV", "")),
        (
            "raise ImportError('GLIBC_2.99 not found')",
            "error",
            ("GLIBC_2.99 not found", "pip install --force-reinstall --no-deps mooncake-transfer-engine==0.3.13"),
        ),
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')",
            "error",
            ("libcudart.so.12, which CUDA or the driver of a GPU brings", "on the machine of the prefill node"),
        ),
    ],
    ids=["library", "crash", "another reason", "CUDA"],
)
def test_an_engine_that_cannot_be_imported(engine: str, mark: str, said: tuple[str, str], made: Make) -> None:
    here = made(SGLANG, WRAPT, PROMETHEUS)
    here.add("mooncake/__init__.py", "print('hello')")
    here.add("mooncake/engine.py", engine)
    add_wheel_record(here, "mooncake-transfer-engine", "0.3.13")
    report = here.doctor(**ON)
    line = report.line("mooncake.engine")
    assert line["mark"] == mark
    assert said[0] in line["finding"]
    assert said[1] in line["do"]
    assert report.verdict.startswith(PERHAPS_NOT if "libcudart" in engine else WILL_NOT_START)


def test_an_engine_that_needs_what_torch_brings_is_imported_as_sglang_does(made: Make) -> None:
    here = made(SGLANG, WRAPT, PROMETHEUS)
    here.add("torch/__init__.py", "there = True")
    here.add("mooncake/__init__.py", "")
    missing = "raise ImportError('libcudart.so.12: cannot open shared object file')"
    needs_torch = f"import sys\nif 'torch' not in sys.modules: {missing}"
    here.add(
        "mooncake/engine.py", f"{needs_torch}\nclass TransferEngine:\n    def send_probe(self, session): return 0\n"
    )
    add_wheel_record(here, "mooncake-transfer-engine", "0.3.13")
    assert here.doctor(**ON).verdict == WILL_PROBE


def test_a_mooncake_that_waits_minutes_to_connect_is_a_warning(made: Make) -> None:
    here = made(SGLANG, WRAPT, PROMETHEUS)
    here.add("mooncake/__init__.py", "")
    here.add("mooncake/engine.py", "class TransferEngine:\n    def send_probe(self): pass\n")
    add_wheel_record(here, "mooncake-transfer-engine", "0.3.11")
    report = here.doctor(**ON)
    assert (report.line("Mooncake")["mark"], report.verdict) == ("warning", WILL_PROBE)
    assert report.line("Mooncake")["do"] == "install 0.3.12 or later"


@pytest.mark.parametrize(
    ("probe", "mark", "verdict"),
    [
        ("os.abort()", "error", f"{WILL_NOT}Mooncake runs on TENT, where a probe ended a child process by SIGABRT"),
        ("return -1", "warning", WILL_PROBE),
    ],
)
def test_a_mooncake_on_tent_that_a_probe_would_end_and_one_with_the_fix(
    probe: str, mark: str, verdict: str, made: Make
) -> None:
    here = made(SGLANG, WRAPT, PROMETHEUS)
    here.add("mooncake/__init__.py", "")
    engine = (
        "import os  # 8mooncake4tent\nclass TransferEngine:\n    def initialize(self, *_): return 0\n"
        f"    def get_rpc_port(self): return 1\n    def send_probe(self, session): {probe}\n"
    )
    here.add("mooncake/engine.py", engine)
    add_wheel_record(here, "mooncake-transfer-engine", "0.3.13")
    assert [line for line in here.doctor(**ON).lines if line["subject"] == "TENT"] == []
    report = here.doctor(MC_USE_TENT="0", **ON)
    line = report.line("TENT")
    assert (line["mark"], report.line("Mooncake")["mark"]) == (mark, "ok")
    assert line["do"].startswith("unset MC_USE_TENT and MC_USE_TEV1")
    assert report.verdict.startswith(verdict)


def test_a_queue_that_a_burst_overflows(sound: Environment) -> None:
    tcp = {"MC_FORCE_TCP": "1", "MOONCAKE_PROTOCOL": "tcp"}
    report = sound.doctor(**tcp, **ON)
    line = report.line("queue")
    assert (line["mark"], report.verdict) == ("warning", WILL_PROBE)
    assert line["do"].startswith("set MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER=65535, or install Mooncake 0.3.14")
    report = sound.doctor(MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER="65535", **tcp, **ON)
    assert [line for line in report.lines if line["subject"] == "queue"] == []


UNREADABLE = b"Metadata-Version: 2.1\nName: \xff\n"


@pytest.mark.parametrize("file", ["METADATA", "RECORD"])
@pytest.mark.parametrize("wheel_of", ["mooncake_utils-0.7", "mooncake_transfer_engine-0.3.13"])
def test_a_wheel_of_mooncake_or_beside_it_whose_files_are_no_text(wheel_of: str, file: str, made: Make) -> None:
    here = made(SGLANG, WRAPT, PROMETHEUS)
    here.add("mooncake/__init__.py", "import sys; sys.stderr.buffer.write(bytes([255]))")
    here.add("mooncake/engine.py", "class TransferEngine:\n    def send_probe(self): pass\n")
    add_wheel_record(here, "mooncake-transfer-engine", "0.3.13")
    here.add(f"{wheel_of}.dist-info/{file}", "")
    (here.site / f"{wheel_of}.dist-info" / file).write_bytes(UNREADABLE)
    report = here.doctor(**ON)
    assert report.verdict == WILL_PROBE
    is_known = (wheel_of, file) != ("mooncake_transfer_engine-0.3.13", "RECORD")
    assert report.whole["mooncake"] == ("mooncake-transfer-engine 0.3.13" if is_known else None)


def test_a_library_that_does_not_say_its_version(made: Make) -> None:
    here = made(SGLANG, MOONCAKE, PROMETHEUS)
    here.add("wrapt/__init__.py", "def register_post_import_hook(*arguments): pass\n")
    (here.site / "wrapt-1.17.dist-info").mkdir()
    assert here.doctor(**ON).line("wrapt")["finding"] == "can be imported"
    (here.site / "wrapt-1.17.dist-info/METADATA").write_bytes(UNREADABLE)
    assert here.doctor(**ON).verdict == WILL_PROBE


def test_entry_points_that_are_no_text_stop_sglang_itself(made: Make) -> None:
    here = made(*EVERYTHING)
    file = here.site / "theirs-1.0.dist-info/entry_points.txt"
    here.add("theirs-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    file.write_bytes(UNREADABLE)
    report = here.doctor(**ON)
    assert report.verdict.startswith(f"{WILL_NOT_START}SGLang cannot read the entry points")
    assert f"do this: reinstall the package of {file}" in report.verdict


def test_an_installed_package_of_ours_that_does_not_say_its_version(made: Make) -> None:
    here = made(*EVERYTHING)
    (installed,) = here.site.glob("sglang_failed_session_probe-*.dist-info")
    (installed / "METADATA").unlink()
    report = here.doctor(**ON)
    assert report.errors == ["package"]
    assert "says of the installed package has no version" in report.verdict
    assert "--force-reinstall" in report.verdict
    said = here.run("-m", "sglang_failed_session_probe", "--version").stdout
    assert said == "sglang-failed-session-probe of unknown version (a checkout, or broken)\n"


def test_two_wheels_of_mooncake_over_one_another(made: Make) -> None:
    here = made(*EVERYTHING)
    add_wheel_record(here, "mooncake-transfer-engine", "0.3.6")
    report = here.doctor(**ON)
    assert report.errors == ["Mooncake"]
    installed = f"{environment.MOONCAKE} {environment.MOONCAKE_VERSION}"
    for words in ("2 wheels", "mooncake-transfer-engine 0.3.6", installed, f"the engine is that of {installed}"):
        assert words in report.verdict
    assert "do this: pip uninstall -y " in report.verdict


def test_a_wheel_that_cannot_probe_over_one_that_can(made: Make) -> None:
    here = made(SGLANG, WRAPT, PROMETHEUS)
    here.add("mooncake/__init__.py", "")
    here.add("mooncake/engine.py", "class TransferEngine: pass\n")
    for name, release in (("mooncake-transfer-engine", "0.3.9"), (environment.MOONCAKE, "0.3.13")):
        add_wheel_record(here, name, release)
    verdict = here.doctor(**ON).verdict
    assert verdict.startswith(f"{WILL_NOT}2 wheels of Mooncake"), "it advises a wheel that is there already"


# The ways in.


def test_a_whitelist_without_us_and_no_pth_file(made: Make) -> None:
    here = made(*EVERYTHING)
    (here.site / doctor._PTH).unlink()
    report = here.doctor(SGLANG_PLUGINS="another, third", **ON)
    assert ".pth file" in report.errors
    assert report.verdict.startswith(f"{WILL_NOT}SGLANG_PLUGINS='another, third' leaves failed_session_probe out")
    assert "do this: set SGLANG_PLUGINS=another, third,failed_session_probe" in report.verdict


def test_one_open_door_is_enough_and_the_other_is_a_warning(made: Make) -> None:
    here = made(*EVERYTHING)
    report = here.doctor(SGLANG_PLUGINS="another", **ON)
    assert (report.line("plugin")["mark"], report.verdict) == ("warning", WILL_PROBE)
    assert here.doctor(SGLANG_PLUGINS="another,failed_session_probe", **ON).line("plugin")["mark"] == "ok"
    (here.site / doctor._PTH).unlink()
    report = here.doctor(**ON)
    assert (report.line(".pth file")["mark"], report.verdict) == ("warning", WILL_PROBE)
    assert "--force-reinstall" in report.line(".pth file")["do"], "pip does nothing: it is installed already"
    assert "processes without plugins (Ray)" in report.line(".pth file")["finding"]


@pytest.mark.parametrize(("release", "enough"), [("0.5.23", True), ("0.5.8.post1", False)])
def test_a_python_that_reads_no_pth_file(release: str, enough: bool, made: Make) -> None:
    here = made(*EVERYTHING, sglang=f"sglang-{release}")
    report = here.doctor("-S", PYTHONPATH=str(here.site), **ON)
    assert "runs with -S" in report.line(".pth file")["finding"]
    assert report.verdict.startswith(WILL_PROBE if enough else WILL_NOT)
    assert here.doctor(**ON).verdict == WILL_PROBE


def test_the_checkout_on_the_path_is_not_an_installation(made: Make) -> None:
    here = made(*EVERYTHING)
    for entry in here.site.glob("sglang_failed_session_probe*"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    report = here.doctor(PYTHONPATH=str(CHECKOUT / "python"), **ON)
    assert "it is not installed" in report.line("package")["finding"]
    assert "is no folder whose .pth files this Python reads" in report.line(".pth file")["finding"]
    assert report.verdict.startswith(WILL_NOT)


def test_another_copy_of_our_package_in_front_of_the_installed_one(made: Make, tmp_path: pathlib.Path) -> None:
    here = made(*EVERYTHING)
    name = "sglang_failed_session_probe"
    shutil.copytree(here.site / name, tmp_path / "front" / name)
    line = here.doctor(PYTHONPATH=str(tmp_path / "front"), **ON).line("package")
    assert line["mark"] == "warning"
    assert f"the copy in {tmp_path / 'front' / name} is in front of the installed one" in line["finding"]


@pytest.mark.parametrize("change", [pathlib.Path.unlink, lambda file: file.write_text("pass")], ids=["gone", "edited"])
def test_a_file_of_ours_that_is_not_as_it_was_installed(change: Callable[[pathlib.Path], object], made: Make) -> None:
    here = made(*EVERYTHING)
    file = "sglang_failed_session_probe/python/sglang/srt/disaggregation/mooncake/conn.py"
    change(here.site / file)
    report = here.doctor(**ON)
    assert report.errors == ["package"]
    assert file in report.verdict
    assert "pip install --force-reinstall" in report.verdict


def test_our_package_in_a_zip_file(made: Make, wheel: pathlib.Path) -> None:
    here = made(*EVERYTHING)
    report = here.doctor(PYTHONPATH=str(wheel), **ON)
    assert report.verdict.startswith(WILL_NOT)
    assert "the files for SGLang's modules are missing" in report.verdict


def test_our_files_are_gone_and_sglang_lies_beside_the_package(made: Make) -> None:
    here = made(*EVERYTHING)
    shutil.rmtree(here.site / "sglang_failed_session_probe/python")
    report = here.doctor(**ON)
    assert report.errors[:1] == ["package"]
    assert report.verdict.startswith(WILL_NOT)


def test_what_the_environment_says_breaks_no_line(sound: Environment) -> None:
    done = sound.run("-m", "sglang_failed_session_probe", "doctor", MC_HANDSHAKE_CONNECT_TIMEOUT="\x1b[2J\n5", **ON)
    assert "\x1b" not in done.stdout
    assert "\n5" not in done.stdout


def test_a_folder_that_is_named_like_a_wheel_without_a_release(made: Make) -> None:
    here = made(*EVERYTHING)
    (here.site / "mooncake.dist-info").mkdir()
    assert here.doctor(**ON).whole["mooncake"]


def test_no_wrapt(made: Make) -> None:
    report = made(SGLANG, MOONCAKE, PROMETHEUS).doctor(**ON)
    assert report.errors == ["wrapt"]
    assert report.verdict.startswith(f"{WILL_NOT}wrapt is not installed")
    assert "No module named 'wrapt'" in report.line(".pth file")["finding"]
    assert report.line(".pth file")["do"] == "pip install wrapt"


@pytest.mark.parametrize("broken", ["", "raise OSError('made for another Python')"])
def test_a_wrapt_that_cannot_be_used(broken: str, made: Make) -> None:
    here = made(SGLANG, MOONCAKE, PROMETHEUS)
    here.add("wrapt/__init__.py", broken)
    report = here.doctor(**ON)
    assert report.errors == ["wrapt"]
    assert report.verdict.startswith(f"{WILL_NOT}wrapt is here and cannot be used (")
    assert report.line("wrapt")["do"] == "pip install --force-reinstall wrapt"


def test_a_wrapt_that_is_older_than_ours_asks_for(made: Make) -> None:
    here = made(SGLANG, MOONCAKE, PROMETHEUS)
    here.add("wrapt/__init__.py", "def register_post_import_hook(*arguments): pass\n")
    here.add("wrapt-1.14.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: wrapt\nVersion: 1.14.1\n")
    report = here.doctor(**ON)
    assert (report.status, report.verdict) == (0, WILL_PROBE)
    assert report.line("wrapt")["mark"] == "warning"
    assert report.line("wrapt")["do"] == "pip install 'wrapt>=1.15'"


def test_no_prometheus_client(made: Make) -> None:
    report = made(SGLANG, MOONCAKE, WRAPT, sglang="sglang-0.5.8.post1").doctor(**ON)
    assert report.errors == ["prometheus_client"]
    assert "will probe blacklisted sessions, but not as asked: prometheus_client is not installed" in report.verdict


# Settings.


@pytest.mark.parametrize(
    "variables",
    [{INTERVAL: "nan"}, {SWITCH: "maybe"}, {INTERVAL: "400"}, {MAX_INTERVAL: "10"}, {SETTLE: "-1"}],
    ids=lambda variables: " ".join(f"{name}={value}" for name, value in variables.items()),
)
def test_a_bad_value_is_named_in_the_sentence_that_would_stop_the_node(
    variables: dict[str, str], sound: Environment
) -> None:
    with pytest.raises(ValueError, match="is not allowed") as refused:
        doctor.load_settings().FailedSessionProbeSettings.from_environment({**ON, **variables})
    report = sound.doctor(**{**ON, **variables})
    assert report.status == 1
    assert report.verdict.startswith(WILL_NOT_START + str(refused.value).rstrip("."))


def test_a_bad_value_stops_nobody_while_the_switch_is_off(sound: Environment) -> None:
    report = sound.doctor(**{INTERVAL: "nan"})
    assert (report.status, report.line(INTERVAL)["mark"]) == (0, "warning")


def test_each_setting_says_whence_it_is(sound: Environment) -> None:
    report = sound.doctor(**{SETTLE: "2", INTERVAL: "400", MAX_INTERVAL: "500"}, **ON)
    assert report.line(SETTLE)["finding"] == "2 (environment)"
    assert report.line(INTERVAL)["finding"] == "400 (environment)"
    assert report.line("SGLANG_FAILED_SESSION_PROBE_VERIFY")["finding"] == "on (default)"
    for variable in doctor.load_settings().FailedSessionProbeSettings.by_variable():
        assert report.line(variable)["mark"] == "ok", "a setting is not shown"


def test_a_misspelt_switch(sound: Environment) -> None:
    report = sound.doctor(SGLANG_ENABLE_FAILED_SESION_PROBE="1")
    assert report.errors == ["misspelt"]
    assert report.verdict.startswith(
        f"{WILL_NOT}nothing reads SGLANG_ENABLE_FAILED_SESION_PROBE; do this: set {SWITCH}"
    )


def test_a_misspelt_setting(sound: Environment) -> None:
    report = sound.doctor(SGLANG_FAILED_SESSION_PROBE_SETTLE="2", **ON)
    assert report.errors == ["misspelt"]
    assert "will probe blacklisted sessions, but not as asked: nothing reads" in report.verdict
    assert f"set {SETTLE} in its place" in report.verdict


def test_variables_of_sglang_and_others_are_not_taken_for_misspelt_ones(sound: Environment) -> None:
    others = {"SGLANG_HOST_IP": "127.0.0.1", "SGLANG_ENABLE_TORCH_COMPILE": "1", "MY_FAILED_SESSION_PROBE": "1"}
    assert not [line for line in sound.doctor(**others, **ON).lines if line["subject"] == "misspelt"]


# The machine.


def test_a_metrics_folder_that_is_not_there(sound: Environment, tmp_path: pathlib.Path) -> None:
    report = sound.doctor(**{MULTIPROC: str(tmp_path / "nowhere")}, **ON)
    assert report.errors == [MULTIPROC]
    assert report.verdict.startswith(f"{WILL_NOT_START}{MULTIPROC}={tmp_path / 'nowhere'} is no folder")
    assert sound.doctor(**{MULTIPROC: str(tmp_path)}, **ON).line(MULTIPROC)["mark"] == "ok"


def test_a_router_may_be_before_the_node_and_is_to_have_the_flags_that_were_measured(sound: Environment) -> None:
    line = sound.doctor(**ON).line("router")
    assert line["mark"] == "info"
    assert " ".join(grid.FLAGS[grid.ADVISED]) in line["do"]
    assert [line for line in sound.doctor().lines if line["subject"] == "router"] == []
