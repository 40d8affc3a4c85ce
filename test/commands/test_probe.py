"""What does `probe` say of a decode node that is live, gone, stopped or behind a firewall, and what to check next?"""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest
from command import Terminal, interrupt, run, started
from kit.imposters import imposters
from kit.network import Network
from kit.node import MEMORY, Node
from kit.releases import environment
from sglang_failed_session_probe.probe import Answer, what_next

OLD_MOONCAKE = "sglang-0.5.23+0.3.10.post2"

# Its first line is what the file of an engine with TENT has.
TENT_ENGINE = """# 8mooncake4tent
import os, signal

class TransferEngine:
    def initialize(self, *arguments): return 0
    def get_rpc_port(self): return 7001
    def send_probe(self, session): os.kill(os.getpid(), signal.SIGSEGV)
    register_memory = batch_transfer_async_read = transfer_sync_read = send_probe
"""


@pytest.fixture
def decode(tmp_path: pathlib.Path) -> Iterator[Node]:
    with Node("decode", tmp_path / "decode") as decode:
        yield decode


def test_a_live_node_answers_and_mooncakes_own_log_stays_away(decode: Node) -> None:
    status, output, errors = run("probe", decode.session)
    assert (status, errors) == (0, "")
    answer, next_line = output.splitlines()
    assert re.fullmatch(rf"{decode.session} answered \(rc 0\) in [\d.]+ m?s", answer)
    assert next_line.startswith("next: an answer is no proof that transfers work")


def test_mooncakes_own_log_is_there_for_who_wants_it(decode: Node) -> None:
    status, output, errors = run("probe", decode.session, "--verbose")
    assert status == 0
    assert "answered" in output
    assert "transfer_engine" in errors


def test_several_probes_end_in_a_summary(decode: Node) -> None:
    status, output, _ = run("probe", decode.session, "--count", "3")
    assert status == 0
    lines = output.splitlines()
    assert [decode.session in line for line in lines] == [True, True, True, False, False]
    assert re.fullmatch(r"answered 3 of 3, min [\d.]+ m?s, median [\d.]+ m?s, max [\d.]+ m?s", lines[3])


def test_a_node_that_dies_between_two_probes_makes_the_command_fail(decode: Node) -> None:
    with started("probe", decode.session, "--count", "5") as process:  # a second apart: it dies before the last
        assert process.stdout is not None
        assert "answered" in process.stdout.readline()
        decode.kill()
        rest = process.stdout.read()
        assert process.wait(10) == 1
    assert re.search("answered [1-4] of 5", rest)
    assert "next: nothing listens" in rest


def test_reading_its_memory_says_that_transfers_work(decode: Node) -> None:
    for address in (hex(decode.address), str(decode.address)):
        verify = ("probe", decode.session, "--verify", address, "--protocol", "tcp")
        status, output, errors = run(*verify, MC_TRANSFER_TIMEOUT="nonsense")
        assert (status, errors) == (0, "")
        assert "transfers work: 4 reads" in output


def test_an_address_that_is_not_registered_is_named_and_harms_nobody(decode: Node) -> None:
    address = hex(decode.address + 2 * MEMORY)
    status, output, _ = run("probe", decode.session, "--verify", address, "--protocol", "tcp")
    assert status == 1
    assert "transfers fail" in output
    assert f"has registered {address}" in output, "the operator is not told that the address itself may be wrong"
    assert run("probe", decode.session)[0] == 0, "a wrong address has ended the decode node"


def test_a_rejected_data_port_is_told_from_a_node_that_is_well(network: Network, tmp_path: pathlib.Path) -> None:
    with Node("decode", tmp_path / "decode", network.path) as decode, network.rejected(decode.data_port):
        verify = ("probe", decode.session, "--verify", hex(decode.address), "--protocol", "tcp")
        status, output, _ = run(*verify, network=network.path)
        assert status == 1
        assert "answered (rc 0)" in output
        assert "transfers fail" in output
        assert "data path" in output


def test_a_dropped_data_port_points_to_the_firewall(network: Network, tmp_path: pathlib.Path) -> None:
    with Node("decode", tmp_path / "decode", network.path) as decode, network.dropped(decode.data_port):
        verify = ("probe", decode.session, "--verify", hex(decode.address), "--protocol", "tcp")
        status, output, _ = run(*verify, network=network.path, MC_TRANSFER_TIMEOUT="5")
        assert status == 1
        assert "next: packets to its data port vanish" in output


def test_dropped_packets_point_to_the_firewall(network: Network, tmp_path: pathlib.Path) -> None:
    with Node("decode", tmp_path / "decode", network.path) as decode, network.dropped(decode.handshake_port):
        status, output, _ = run("probe", decode.session, network=network.path, MC_HANDSHAKE_CONNECT_TIMEOUT="1")
        assert status == 1
        assert "next: packets vanish on the way" in output


def test_another_program_on_that_port_is_told_from_one_where_nothing_listens() -> None:
    with imposters("garbage") as [session]:
        status, output, _ = run("probe", session)
    assert status == 1
    assert f"{session} cut short (rc -102)" in output
    assert "another program has that port" in output


def test_a_host_that_nobody_knows_is_called_that() -> None:
    status, output, _ = run("probe", "no-such-host.invalid:15412")
    assert status == 1
    assert "host not known (rc -101)" in output
    assert "next: look at the host's name" in output


def test_a_node_with_an_ipv6_address_is_asked_there(network: Network, tmp_path: pathlib.Path) -> None:
    status, output, _ = run("probe", "[::1]:1", network=network.path)
    assert status == 1
    assert "next: nothing listens" in output, "an IPv6 address was never asked"


@pytest.mark.parametrize(
    ("rc", "seconds", "words"),
    [
        (-102, 0.00003, "nothing listens"),
        (-102, 0.001, "nothing listens"),
        (-102, 1.0, "packets vanish"),
        (-102, 5.0, "packets vanish"),
        (-102, 60.0, "stopped or hung"),
        (-102, 61.0, "stopped or hung"),
        (-102, 134.0, "packets vanish"),
        (-101, 0.001, "name"),
        (-1, 0.001, "--verbose"),
    ],
)
def test_the_rc_and_its_time_say_what_to_check_next(rc: int, seconds: float, words: str) -> None:
    assert words in what_next(Answer(rc, seconds))


def test_a_probe_that_hangs_says_so_and_ends_at_once_with_a_ctrl_c() -> None:
    with imposters("silent") as [session], Terminal() as terminal:  # it answers as little as a stopped process
        with started("probe", session, stdout=terminal.end_of_command) as process:
            terminal.wait_for("no answer yet", deadline_s=20)
            interrupt(process)
            assert process.stderr is not None
            assert process.stderr.read() == "", "a Ctrl-C ended in a complaint"
        assert process.returncode == 130, "a Ctrl-C must not end in an abort"


def test_a_probe_that_hangs_writes_nothing_into_a_pipe() -> None:
    with imposters("silent") as [session], started("probe", session) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        interrupt(process)
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_without_mooncake_one_line_says_what_to_install(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mooncake.py").write_text("raise ModuleNotFoundError('No module named mooncake', name='mooncake')")
    status, output, errors = run("probe", "127.0.0.1:1", in_front=tmp_path)
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert "pip install 'sglang-failed-session-probe[mooncake-transfer-engine-non-cuda]'" in line


def test_a_mooncake_that_cannot_be_loaded_gets_one_line_with_the_reason(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mooncake.py").write_text("raise ImportError('libibverbs.so.1: cannot open shared object file')")
    status, output, errors = run("probe", "127.0.0.1:1", in_front=tmp_path)
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert "libibverbs.so.1" in line


def test_what_an_import_says_is_told_in_one_line_whatever_it_is(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mooncake.py").write_text(r"raise ImportError('a\n' + '\x1b[31m' + 'b' * 100_000)")
    status, output, errors = run("probe", "127.0.0.1:1", in_front=tmp_path)
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert r"cannot be imported: a\n\x1b[31mbbb" in line
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.parametrize(
    "arguments",
    [["a\n\x1b[31m:1"], ["a" * 100_000], ["a:1", "--count", "1" * 5000], ["a:1", "--verify", "0x" + "f" * 5000]],
)
def test_an_argument_that_is_wrong_is_said_in_one_line(arguments: list[str]) -> None:
    status, output, errors = run("probe", *arguments)
    assert (status, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.isprintable()
    assert len(line) < 1000


def test_an_old_mooncake_gets_one_line_with_the_version_that_can() -> None:
    status, output, errors = run("probe", "127.0.0.1:1", python=str(environment.python(OLD_MOONCAKE)))
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert "0.3.10.post2" in line
    assert "0.3.11 or later" in line


@pytest.mark.parametrize("variable", ["MC_USE_TENT", "MC_USE_TEV1"])
def test_a_mooncake_on_tent_gets_one_line_and_is_neither_probed_nor_read(variable: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    (tmp_path / "mooncake" / "engine.py").write_text(TENT_ENGINE)
    status, output, errors = run("probe", "127.0.0.1:1", "--verify", "0x1000", in_front=tmp_path, **{variable: "1"})
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert "runs on TENT here: run this without MC_USE_TENT and MC_USE_TEV1" in line


def test_beside_sglang_nothing_of_it_is_imported() -> None:
    python = str(environment.python("sglang-0.5.23"))
    code = (
        "import sglang_failed_session_probe as package; package.activate();"
        "from sglang_failed_session_probe import __main__; __main__.main()"
    )
    what = ("-X", "importtime", "-c", code)
    status, output, imports = run(
        "probe", "127.0.0.1:1", "--verbose", python=python, what=what, SGLANG_ENABLE_FAILED_SESSION_PROBE="1"
    )
    assert status == 1
    assert "nothing listens" in output
    assert " torch" not in imports, "the command imports SGLang, which takes half a minute"
    assert "sglang.version" not in imports
    assert "session_probe" in imports
