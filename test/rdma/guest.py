"""The first program in a machine with RDMA: it sets up the networks and then runs what it is told to.

`guest.py MACHINE PRELOAD DEVICES`; JSON lines over a virtio port, `{"id", "what", "with"}`, answered in any order with
`{"id", "value"}` or `{"id", "error"}`.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Of the network cards: over the first the machines shake hands, the others are RDMA devices.
SUBNETS = ("192.168.77", "192.168.78", "192.168.79")


class Guest:
    """Processes in this machine, by name. Any thread."""

    def __init__(self, machine: str, preload: str) -> None:
        self._machine = machine
        self._preload = preload
        self._nodes: dict[str, subprocess.Popen[str]] = {}
        self._one_at_a_time: dict[str, threading.Lock] = {}

    def run(self, command: str) -> str:
        """Runs a shell command, 60 s at most, and gives what it printed."""
        done = subprocess.run(
            command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{command} gave {done.returncode}: {done.stdout}")
        return done.stdout

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> Any:
        """Starts a node, in place of one by that name; gives the line that it writes when it is ready.

        A node takes a line of JSON on stdin and answers with one on stdout.
        """
        if name in self._nodes:
            self.kill(name)
        variables = {
            **os.environ,
            "LD_PRELOAD": self._preload,
            "SGLANG_HOST_IP": f"{SUBNETS[0]}.{self._machine}",
            "MOONCAKE_PROTOCOL": "rdma",
            **environment,
        }
        with self._log(name).open("a") as log:
            self._nodes[name] = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._one_at_a_time[name] = threading.Lock()
        return self._answer(name)

    def ask(self, name: str, command: Any) -> Any:
        """Hands a node a command and gives its answer."""
        with self._one_at_a_time[name]:
            stdin = self._nodes[name].stdin
            assert stdin is not None
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
            return self._answer(name)

    def signal(self, name: str, number: int) -> None:
        self._nodes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL; when this returns, the process is gone."""
        self._nodes[name].kill()
        self._nodes[name].wait()

    def end(self, name: str) -> None:
        """As ``kill``, and its log goes too."""
        self.kill(name)
        del self._nodes[name]
        self._log(name).unlink()

    def log(self, name: str) -> str:
        """The last megabyte of what a node and Mooncake in it have written, from all of its processes."""
        return self._log(name).read_bytes()[-1_000_000:].decode(errors="replace")

    def clock(self) -> float:
        return time.monotonic()

    def _log(self, name: str) -> pathlib.Path:
        return pathlib.Path(f"/run/mooncake-{name}.log")

    def _answer(self, name: str) -> Any:
        stdout = self._nodes[name].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{name} has ended with {self._nodes[name].wait()}: {self.log(name)[-3000:]}")
        return json.loads(line)


def set_up_networks(machine: str, devices: int) -> None:
    """Addresses, and a Soft-RoCE device on each RDMA network that is wanted."""
    commands = [
        "ip link set lo up",
        "echo 0 > /proc/sys/net/ipv4/tcp_max_tw_buckets",  # a killed process leaves its ports free at once
        # Of the devices on one network each answers for itself.
        "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore && echo 2 > /proc/sys/net/ipv4/conf/all/arp_announce",
    ]
    for number, subnet in enumerate(SUBNETS[: devices + 1]):
        commands.append(f"ip address add {subnet}.{machine}/24 dev eth{number} && ip link set eth{number} up")
        if number:
            commands.append(f"rdma link add rxe{number - 1} type rxe netdev eth{number}")
    subprocess.run(" && ".join(commands), shell=True, check=True)


def serve(guest: Guest) -> None:
    """Does what comes over the virtio port, each in a thread of its own."""
    (port,) = (
        port.parent.name
        for port in pathlib.Path("/sys/class/virtio-ports").glob("*/name")
        if port.read_text() == "agent\n"
    )
    descriptor = os.open(f"/dev/{port}", os.O_RDWR)
    sending = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        rest = (json.dumps(message) + "\n").encode()
        with sending:
            while rest:
                rest = rest[os.write(descriptor, rest) :]

    def do(message: dict[str, Any]) -> None:
        try:
            value: Callable[..., Any] = getattr(guest, message["what"])
            send({"id": message["id"], "value": value(*message["with"])})
        except Exception as error:
            send({"id": message["id"], "error": f"{type(error).__name__}: {error}"})

    send({"id": 0, "value": "ready"})
    for line in os.fdopen(os.dup(descriptor)):
        threading.Thread(target=do, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    os.chdir("/run")
    set_up_networks(sys.argv[1], int(sys.argv[3]))
    serve(Guest(*sys.argv[1:3]))
