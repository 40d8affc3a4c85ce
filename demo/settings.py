"""Which environment variables do the processes of a demo run with?"""

from __future__ import annotations

import os

from python.sglang_failed_session_probe import SWITCH


def node_variables(feature: bool | None) -> dict[str, str]:
    """The variables of a prefill or decode process: the feature on, off or (None) unset, Mooncake over TCP on loopback.

    Ours are inherited, except for those that would change SGLang, Mooncake or Python.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "MC_", "PYTHON"))}
    return {
        **inherited,
        **({} if feature is None else {SWITCH: str(int(feature))}),
        "SGLANG_HOST_IP": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        "MOONCAKE_PROTOCOL": "tcp",
        "MC_FORCE_TCP": "1",  # SGLang to 0.5.12.post1 does not ask MOONCAKE_PROTOCOL
        "MC_TRANSFER_TIMEOUT": "5",  # Mooncake's least; by default a transfer takes 30 s to fail
    }
