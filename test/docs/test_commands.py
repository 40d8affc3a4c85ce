"""Does every command in the docs work as it stands there? An operator will copy it.

Names of machines are replaced by what runs here. A command that is not known here fails the test: see how it is run.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess

import prometheus
import pytest
from kit.node import Node
from kit.releases import CHECKOUT, environment
from kit.stock_node import clean_environment

DOCS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("deploy/**/*.md")])
PROGRAMS = ("make", "pip", "python", "sglang-failed-session-probe", "kill", "promtool", "curl", "kubectl", "docker")
NAMES = ("pip install", "sglang-failed-session-probe probe")  # in a sentence, without what belongs to them
DEADLINE_S = 300
SESSION = "10.0.3.7:15412"
NODE_URL = "http://prefill-"


def commands() -> list[str]:
    """The commands of all docs: in backquotes, in indented lines and in fences; they begin with a program's name."""
    found = []
    for doc in DOCS:
        in_fence = False
        for line in doc.read_text().splitlines():
            if line.lstrip().startswith("```"):
                in_fence = not in_fence
            elif in_fence or line.startswith("    "):
                found += line.strip().removeprefix("RUN ").split("# or, from a checkout: ")
            else:
                found += re.findall(r"`([^`]+)`", line)
    cleaned = (re.split(r" {3,}| +#", command.strip())[0] for command in found)
    whole = (command for command in cleaned if " " in command and command not in NAMES)
    return [command for command in dict.fromkeys(whole) if command.split(" ")[0] in PROGRAMS]


def of(program: str) -> list[str]:
    return [command for command in commands() if command.split(" ")[0] == program]


def test_no_command_of_the_docs_is_left_out_here() -> None:
    tried = ("make", "pip", "sglang-failed-session-probe", "kill", "promtool", "kubectl")
    assert [command for command in commands() if command.split(" ")[0] not in tried] == []
    assert len(commands()) > 15


@pytest.mark.parametrize("command", of("make"))
def test_every_target_of_the_docs_is_one(command: str) -> None:
    """The targets themselves are run by .ci/run, by test/servers, test/activation and test/faults/test_kit.py."""
    done = subprocess.run([*command.split(), "--dry-run"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_promtool_is_content_with_the_rules_and_with_what_kubectl_is_given(tmp_path: pathlib.Path) -> None:
    try:
        programs = prometheus.folder()
    except environment.CannotMake as error:
        pytest.skip(f"there is no promtool: {error}")

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    for command in of("promtool"):
        run(f"{programs}/{command}")
    (applied,) = re.findall(r"^(kubectl apply.*?^END)$", (CHECKOUT / "deploy/README.md").read_text(), re.S | re.M)
    given = run(f"kubectl() {{ cat; }}\n{applied}")
    header, rules = given.split("spec:\n")
    assert "kind: PrometheusRule" in header
    file = tmp_path / "rules.yml"
    file.write_text("".join(line.removeprefix("  ") + "\n" for line in rules.splitlines()))
    run(f"{programs}/promtool check rules {file}")


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of what a clone has, so that what the commands build is left nowhere."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("Makefile", "README.md", "LICENSE", "pyproject.toml", "hatch_build.py", "python", "tools", "demo"):
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.mark.timeout(DEADLINE_S)
def test_what_an_operator_installs_asks_and_removes(checkout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """All commands of ours and of pip, in one environment with SGLang, beside a decode node and a prefill node."""
    python = environment.in_front_of(f"sglang-{environment.SHARED_RELEASE}", tmp_path / "venv")
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    with (
        Node("decode", tmp_path / "decode.log") as decode,
        Node("prefill", tmp_path / "prefill.log") as prefill,
    ):
        url = f"http://127.0.0.1:{prefill.ask('serve_metrics', 0)}"

        def run(command: str) -> str:
            here = re.sub(rf"{NODE_URL}\d:30000", url, command).replace(SESSION, decode.session)
            here = here.replace("HOST:PORT", decode.session).replace("/tmp/", "dist/")
            here = here.replace("PID", str(decode.process.pid))
            here = re.sub("^pip ", "python -m pip ", here)  # the environment has no pip of its own
            switch = {"SGLANG_ENABLE_FAILED_SESSION_PROBE": "1", "PATH": f"{python.parent}:/usr/bin:/bin"}
            done = subprocess.run(
                f"timeout --signal INT 3 {here}" if "--watch" in here else here,
                shell=True,
                cwd=checkout,
                env={**clean_environment(), **switch},
                input="y\n",
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
            )
            ended_well = (124, 130) if "--watch" in here else (0,)
            assert done.returncode in ended_well, f"{here}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            return done.stdout

        environment.built_wheel("engines", checkout, checkout / "dist")
        installs = [command for command in of("pip") if " install " in command]
        assert len(installs) >= 3
        for command in installs:
            run(command)
            assert "will probe blacklisted sessions" in run("sglang-failed-session-probe doctor").splitlines()[-1]
        assert json.loads(run("sglang-failed-session-probe doctor --json"))["ready"]
        ours = of("sglang-failed-session-probe")
        assert len(ours) >= 4
        for command in ours:
            run(command)
        assert "answered" in run(next(command for command in ours if " probe " in command))
        assert "nothing is blacklisted" in run(next(command for command in ours if " status " in command))
        for command in of("kill"):
            run(command)
        for command in of("pip"):
            if " uninstall " in command:
                run(command)
        assert not (python.parent / "sglang-failed-session-probe").exists()
