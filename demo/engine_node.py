"""What runs in each of the two processes of `make demo-quick`? One manager, standing alone, which does as it is told.

`engine_node.py prefill|decode`: one JSON list (command, arguments) per line on stdin, one JSON answer each on stdout.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import prometheus_client
from sglang.srt.disaggregation.mooncake.conn import KVTransferError, MooncakeKVManager, PeerMemory

BLOCKS = 1 << 20  # bytes


def main(role: str) -> None:
    """Serve commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Mooncake prints
    memory = ctypes.create_string_buffer(BLOCKS)
    here = ctypes.addressof(memory)
    args = types.SimpleNamespace(kv_data_ptrs=[here], kv_data_lens=[BLOCKS], aux_data_ptrs=[], aux_data_lens=[])
    manager = MooncakeKVManager(args, role)
    server, _thread = prometheus_client.start_http_server(0, addr="127.0.0.1")

    def send(session: str, there: int, byte: int) -> str:
        """Fill the blocks and send them; empty if they arrived, else why not."""
        ctypes.memset(here, byte, BLOCKS)
        try:
            manager.send_blocks(session, [(here, there, BLOCKS)])
        except KVTransferError as error:
            return str(error)
        return ""

    commands: dict[str, Callable[..., Any]] = {
        "about": lambda: [manager.get_session_id(), here, server.server_port],
        "register": lambda session, there: manager.register_decode(session, PeerMemory([there])),
        "send": send,
        "bytes": lambda: sorted(set(memory.raw)),
    }
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    main(sys.argv[1])
