"""What delays the answers of a port? `relay.py PORT SECONDS` prints the port on which it relays to PORT.

It ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

from kit.network import RELAY_MARK


async def relay(port: int, seconds: float) -> None:
    """Serves until stdin ends."""

    async def connected(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        peer = socket.socket()
        peer.setblocking(False)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RELAY_MARK)
        try:
            await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", port))
        except OSError:
            to_client.close()
            return
        server, to_server = await asyncio.open_connection(sock=peer)
        await asyncio.gather(copy(client, to_server, 0.0), copy(server, to_client, seconds), return_exceptions=True)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, seconds: float) -> None:
    """Hands on what comes, each piece that much later than it came, and the end as well."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    now: Any = asyncio.get_running_loop().time

    async def hand_on() -> None:
        while True:
            came_at, piece = await pieces.get()
            await asyncio.sleep(came_at + seconds - now())
            if not piece:
                target.close()
                return
            target.write(piece)

    handing_on = asyncio.create_task(hand_on())
    try:
        while piece := await source.read(65536):
            pieces.put_nowait((now(), piece))
    finally:
        pieces.put_nowait((now(), b""))
        await handing_on


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1]), float(sys.argv[2])))
