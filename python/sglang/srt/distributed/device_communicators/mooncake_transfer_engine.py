"""How does SGLang's Mooncake engine send a probe?

Beside SGLang this file runs at the end of SGLang's own module and gives its class ``send_probe``; alone it is the
smallest wrapper that the standing-alone ``MooncakeKVManager`` needs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, Optional


def send_probe(self: Any, peer_session_id: str) -> int:
    """Probes the peer: 0 if it answers, -1 where the installed Mooncake cannot probe.

    Blocks for 0.2 ms for a live peer, for a minute and longer for a stopped one; any thread, no lock held.
    """
    # Imported late, because SGLang imports this module early, and the connector's package pulls in half of SGLang.
    from sglang.srt.disaggregation.mooncake.session_probe import probe

    return probe(self.engine, peer_session_id)


def patch_failed_session_probe(patch: Any, sglang: dict[str, Any]) -> None:
    """Gives SGLang's ``MooncakeTransferEngine`` the method. Raises KeyError where the release has no such class."""
    patch.replace(sglang["MooncakeTransferEngine"], "send_probe", send_probe)


if "MooncakeTransferEngine" not in globals():

    class MooncakeTransferEngine:
        """A Mooncake engine with SGLang's method names: host memory, peer-to-peer handshake."""

        send_probe = send_probe

        def __init__(self, hostname: str, gpu_id: Optional[int] = None, ib_device: Optional[str] = None) -> None:
            """``MOONCAKE_PROTOCOL`` chooses the transport (default rdma). Raises RuntimeError if Mooncake refuses."""
            from mooncake.engine import TransferEngine

            self.engine = TransferEngine()
            protocol = os.environ.get("MOONCAKE_PROTOCOL", "rdma")
            rc = self.engine.initialize(hostname, "P2PHANDSHAKE", protocol, ib_device or "")
            if rc != 0:
                raise RuntimeError(f"Mooncake did not initialize on {hostname} with protocol {protocol} (rc {rc}).")
            host = f"[{hostname}]" if ":" in hostname else hostname
            self.session_id = f"{host}:{self.engine.get_rpc_port()}"

        def get_session_id(self) -> str:
            return self.session_id

        def batch_register(self, ptrs: list[int], lengths: list[int]) -> int:
            return int(self.engine.batch_register_memory(ptrs, lengths))

        def batch_deregister(self, ptrs: list[int]) -> int:
            return int(self.engine.batch_unregister_memory(ptrs))

        def batch_transfer_sync(
            self, session_id: str, buffers: list[int], peer_buffer_addresses: list[int], lengths: list[int]
        ) -> int:
            """Writes local buffers to the peer's memory and waits; 0 if all of it arrived."""
            return int(self.engine.batch_transfer_sync_write(session_id, buffers, peer_buffer_addresses, lengths))
