"""Does a decode node answer from this machine, and can its memory be read? Probes it through a real Mooncake engine."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import socket
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

from sglang_failed_session_probe.mooncake_wheels import TENT_VARIABLES
from sglang_failed_session_probe.own_files import leave_sglang_out
from sglang_failed_session_probe.printable import printable, printable_repr

if TYPE_CHECKING:
    from sglang.srt.disaggregation.mooncake.session_states import Verdict

INTERVAL_S = 1.0
# A probe whose packets are dropped ends with the connect: after 5 s, the default of MC_HANDSHAKE_CONNECT_TIMEOUT, or
# after 134 s up to Mooncake 0.3.11. One that is connected waits 60 s for a reply.
SILENT_FOR_S = (55.0, 100.0)
# A rejected read takes a second at most; one whose packets are dropped takes 5 s, the least MC_TRANSFER_TIMEOUT.
READ_REJECTED_WITHIN_S = 4.0

_ERASE_LINE = "\r\x1b[K"
_NOT_INSTALLED = (
    "Mooncake is not installed here: run this where SGLang runs, or "
    "pip install 'sglang-failed-session-probe[mooncake-transfer-engine-non-cuda]'"
)


class _CannotProbe(Exception):
    """There is no engine to probe with; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("session", metavar="HOST:PORT", type=_session, help="a session id, as SGLang's log names it")
    parser.add_argument("--count", metavar="N", type=_count, default=1, help="so many probes, a second apart")
    parser.add_argument(
        "--verify",
        metavar="ADDRESS",
        type=_address,
        help="also read 8 bytes there: an address that this decode process has registered with Mooncake (no log names "
        "one; a prefill node knows some and reads them by itself)",
    )
    parser.add_argument(
        "--protocol",
        choices=("tcp", "rdma"),
        help="the transport of --verify; by default MOONCAKE_PROTOCOL, else rdma, as in SGLang",
    )
    parser.add_argument("--verbose", action="store_true", help="show what Mooncake itself logs")


def run(arguments: argparse.Namespace) -> int:
    """Probes and says what to check next; 0 if all probes were answered and, with ``--verify``, the reads worked."""
    leave_sglang_out()
    if not arguments.verbose:
        _mute_mooncake()
    session, address = arguments.session, arguments.verify
    protocol = arguments.protocol or (os.environ.get("MOONCAKE_PROTOCOL", "rdma") if address else "tcp")
    try:
        engine = _aside(session, lambda: _engine_towards(session, protocol))
    except _CannotProbe as why:
        print(f"sglang-failed-session-probe probe: {why}", file=sys.stderr)
        return 1
    answers = _probe_repeatedly(engine, session, arguments.count)
    failed = [answer for answer in answers if answer.rc != 0]
    if failed:
        print(f"next: {what_next(failed[-1])}")
    if answers[-1].rc != 0:
        return 1
    if address is None:
        if not failed:
            print("next: an answer is no proof that transfers work; a prefill node also reads its memory")
        return 1 if failed else 0
    return 0 if _verify(engine, session, address) and not failed else 1


@dataclasses.dataclass
class Answer:
    """How one probe ended."""

    rc: int  # of ``probe_and_listen``
    seconds: float

    def __str__(self) -> str:
        from sglang.srt.disaggregation.mooncake.session_probe import CUT_SHORT, NO_ANSWER, UNKNOWN_HOST

        if self.rc == 0:
            return f"answered (rc 0) in {_duration(self.seconds)}"
        words = {UNKNOWN_HOST: "host not known", NO_ANSWER: "no answer", CUT_SHORT: "cut short"}.get(self.rc, "failed")
        rc = NO_ANSWER if self.rc == CUT_SHORT else self.rc
        return f"{words} (rc {rc}) after {_duration(self.seconds)}"


def _probe_repeatedly(engine: Any, session: str, count: int) -> list[Answer]:
    from sglang.srt.disaggregation.mooncake.session_probe import probe_and_listen

    def probe() -> Answer:
        began = time.monotonic()
        return Answer(probe_and_listen(engine, session), time.monotonic() - began)

    answers: list[Answer] = []
    for number in range(count):
        if number:
            time.sleep(max(0.0, INTERVAL_S - answers[-1].seconds))
        answers.append(_aside(session, probe))
        print(f"{session} {answers[-1]}")
    if count > 1:
        times = [answer.seconds for answer in answers if answer.rc == 0]
        print(f"answered {len(times)} of {count}{_spread(times)}")
    return answers


def _spread(times: list[float]) -> str:
    figures = ((word, fn(times)) for word, fn in (("min", min), ("median", statistics.median), ("max", max)) if times)
    return "".join(f", {word} {_duration(seconds)}" for word, seconds in figures)


def what_next(answer: Answer) -> str:
    """What to check after a probe that was not answered."""
    from sglang.srt.disaggregation.mooncake import session_probe

    if answer.rc == session_probe.UNKNOWN_HOST:
        return (
            "look at the host's name: it is not known here, or has an IPv6 address alone and MC_USE_IPV6=1 is not set"
        )
    if answer.rc == session_probe.CUT_SHORT:
        return (
            "something takes connections there and answers no probe: its Mooncake is older than "
            f"{session_probe.FIRST_MOONCAKE_THAT_ANSWERS}, or another program has that port (each start of a decode "
            "node takes another one)"
        )
    if answer.rc != session_probe.NO_ANSWER:
        return "run it again with --verbose: Mooncake's own log says more"
    if answer.seconds < session_probe.REFUSED_WITHIN_S:
        return (
            "nothing listens on that port, or the way there is rejected: is the decode node up, is this still its "
            "session (each start takes another port)?"
        )
    if SILENT_FOR_S[0] <= answer.seconds < SILENT_FOR_S[1]:
        return (
            "the port takes connections and says nothing: is the decode process stopped or hung, is this its handshake "
            "port and not another one, does a firewall cut connections?"
        )
    return (
        "packets vanish on the way: look at firewalls, security groups and routes between here and there "
        "(Mooncake gives up after MC_HANDSHAKE_CONNECT_TIMEOUT, 5 s by default)"
    )


def _verify(engine: Any, session: str, address: int) -> bool:
    from sglang.srt.disaggregation.mooncake import session_probe
    from sglang.srt.disaggregation.mooncake.session_states import Verdict

    reader = session_probe.MemoryReader(engine, lambda _: types.SimpleNamespace(dst_kv_ptrs=[address]))

    def read() -> tuple[Any, str]:
        if session_probe.probe(engine, session) != 0:
            return None, ""
        reads = reader.begin(session)
        # Reads whose packets are dropped stay pending: they are given up when Mooncake would give up a transfer.
        while (verdict := reads.look()) is None and reads.age_s() < session_probe.transfer_timeout_s():
            time.sleep(0.001)
        return verdict or Verdict.UNREADABLE, reads.why or "reads of its memory have not ended"

    began = time.monotonic()
    verdict, why = _aside(session, read)
    seconds = time.monotonic() - began
    if verdict in (Verdict.READABLE, Verdict.READABLE_LATE, Verdict.READABLE_UNSEEN):
        reads = f"{session_probe.READS_AT_A_TIME} reads of {session_probe.READ_BYTES} bytes at {address:#x}"
        print(f"transfers work: {reads} in {_duration(seconds)}")
        return True
    if verdict is Verdict.UNREADABLE:
        print(f"transfers fail: {why} after {_duration(seconds)}")
    else:
        print(f"not verified after {_duration(seconds)}: {verdict.value if verdict else 'unanswered'}")
    print(f"next: {_what_next_to_verify(verdict, address, seconds)}")
    return False


def _what_next_to_verify(verdict: Optional[Verdict], address: int, seconds: float) -> str:
    if verdict is None:
        return "it answered and then no more: run it again with --count 10"
    if verdict.value == "cannot tell":
        return "this Mooncake reads no memory with that protocol: see --protocol"
    if seconds > READ_REJECTED_WITHIN_S:
        return "packets to its data port vanish: open it in firewalls (MC_MIN_RPC_PORT to MC_MAX_RPC_PORT there)"
    return (
        f"make sure that this very decode process has registered {address:#x} (a restart changes addresses) and uses "
        "the same protocol; then it is the data path, over TCP a port of its own (MC_MIN_RPC_PORT to MC_MAX_RPC_PORT "
        "there)"
    )


def _aside(session: str, job: Callable[[], Any]) -> Any:
    """Returns or raises what the job does, and says on a terminal that it waits.

    The job may hang in Mooncake, so it runs on a thread of its own, and a Ctrl-C ends it within a quarter of a second.
    """
    from sglang.srt.disaggregation.mooncake.hung_call import end_call

    done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            done.set_result(job())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work, name="MooncakeProbe", daemon=True)
    thread.start()
    began = time.monotonic()
    try:
        while not concurrent.futures.wait([done], timeout=0.25).done:
            waited_s = time.monotonic() - began
            if sys.stdout.isatty() and waited_s > 1.0:
                print(f"{_ERASE_LINE}no answer yet, {waited_s:.0f} s", end="", flush=True)
    except BaseException:  # a thread that comes back while the interpreter shuts down would abort it
        end_call(thread.native_id or 0, session, thread.is_alive)
        thread.join(timeout=0.5)
        raise
    finally:
        if sys.stdout.isatty():
            print(_ERASE_LINE, end="", flush=True)
    return done.result()


def _engine_towards(session: str, protocol: str) -> Any:
    """An engine with the address by which this machine reaches the peer. Raises _CannotProbe."""
    from sglang.srt.disaggregation.mooncake import session_probe, tent_probe
    from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import MooncakeTransferEngine

    os.environ["MOONCAKE_PROTOCOL"] = protocol
    if session.startswith("["):
        os.environ["MC_USE_IPV6"] = "1"
    try:
        engine = MooncakeTransferEngine(_own_address(session))
    except (ImportError, RuntimeError) as error:
        why = printable(str(error))
        if isinstance(error, RuntimeError):
            why += " --verbose shows its log; --protocol tcp needs no device"
        elif not isinstance(error, ModuleNotFoundError):
            why = f"Mooncake cannot be imported: {why}"
        elif (error.name or "").startswith("mooncake"):
            why = _NOT_INSTALLED
        raise _CannotProbe(why) from error
    mooncake = session_probe.mooncake_version()
    if tent_probe.is_on():  # a probe may end the process, and reads are not safe
        raise _CannotProbe(f"{mooncake} runs on TENT here: run this without {' and '.join(TENT_VARIABLES)}")
    if not session_probe.can_probe(engine):
        needed = session_probe.FIRST_MOONCAKE_WITH_PROBE
        raise _CannotProbe(f"{mooncake} cannot probe: install Mooncake {needed} or later here")
    return engine


def _own_address(session: str) -> str:
    host, _, port = session.rpartition(":")
    try:
        family, kind, _, _, peer = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unsent:
            unsent.connect(peer)  # sends nothing: the kernel looks up the route
            return str(unsent.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _mute_mooncake() -> None:
    """Discards what Mooncake's own code writes; what this command writes goes where it went before."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(os.dup(descriptor), "w", buffering=1, errors="backslashreplace"))
        os.dup2(nowhere, descriptor)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 0.1 else f"{seconds:.1f} s"


def _session(text: str) -> str:
    leave_sglang_out()
    from sglang.srt.disaggregation.mooncake.session_watch import is_session_id

    if not is_session_id(text):
        raise argparse.ArgumentTypeError(
            f"{printable_repr(text)} is not a host and a port from 1 to 65535, as in 10.0.3.7:15412 or [fd00::7]:15412"
        )
    return text


def _count(text: str) -> int:
    return _whole_number(text, 10, sys.maxsize, "a whole number greater than 0")


def _address(text: str) -> int:
    base = 16 if text.lower().startswith("0x") else 10
    return _whole_number(text, base, (1 << 64) - 8, "an address: 0x and hexadecimal digits, or a decimal number")


def _whole_number(text: str, base: int, most: int, allowed: str) -> int:
    try:
        number = int(text, base)
    except ValueError:
        number = 0
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{printable_repr(text)} is not {allowed}")
    return number
