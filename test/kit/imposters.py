"""What else can be on a peer's port, and how do tests put it there?

`imposters.py KIND COUNT PORT` puts it on COUNT ports from PORT on, 0: any, and prints them as JSON; it ends when its
stdin does.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Iterator

from kit import processes

HOST = "127.0.0.1"
# Of Mooncake's handshake: an 8-byte length, a byte that tells the kind of message, JSON. 3 asks whether it is there.
IS_ANYBODY_THERE = 3


@contextlib.contextmanager
def imposters(kind: str, count: int = 1, port: int = 0, network: str | None = None) -> Iterator[list[str]]:
    """Puts imposters of a kind on ports of 127.0.0.1, in the network namespace at that path; gives their ``host:port``.

    "echo" sends back what it is sent, "failure" a JSON reply that says it failed, "garbage" what is no reply, "drip" a
    reply without end, a byte every 0.1 s, and "silent" nothing.
    """
    with processes.running(processes.kit_program("imposters", kind, count, port), network) as ports:
        yield [f"{HOST}:{port}" for port in json.loads(ports)]


def reply(document: bytes) -> bytes:
    """A document as Mooncake's handshake frames it."""
    return struct.pack("<Q", 1 + len(document)) + bytes([IS_ANYBODY_THERE]) + document


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while piece := self.request.recv(4096):
            self.request.sendall(piece)


class Failure(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(4096):
            self.request.sendall(reply(b'{"failed": true, "error": "no such service"}'))


class Garbage(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(4096):
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(range(256)))


class Drip(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        for byte in reply(b" " * 100_000):
            self.request.sendall(bytes([byte]))
            time.sleep(0.1)


HANDLERS = {"echo": Echo, "failure": Failure, "garbage": Garbage, "drip": Drip}


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who hangs up is no fault of ours."""


def listen(kind: str, port: int) -> int:
    """Puts one on the port and gives the port."""
    if kind == "silent":  # the kernel makes the connections and takes what is sent; nobody reads it
        listener = socket.create_server((HOST, port), backlog=128)
        kept.append(listener)
        return int(listener.getsockname()[1])
    server = Server((HOST, port), HANDLERS[kind])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


kept: list[socket.socket] = []

if __name__ == "__main__":
    _, kind, count, first = sys.argv
    print(json.dumps([listen(kind, int(first) and int(first) + i) for i in range(int(count))]), flush=True)
    sys.stdin.read()
