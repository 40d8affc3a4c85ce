"""Does a thread of this process wait for an RDMA connection to be made? That holds up transfers to others.

Mooncake makes connections in the thread that posts all transfers of a device. Over RoCE the driver, here and on the
peer's side, looks up the address of the other device, and waits a second for one on the same network that does not
reply: here the thread is in a call to the driver, or it waits for the peer's answer to the handshake. Where the address
is known, be it a router's, it does not wait.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Collection
from typing import Optional

from sglang.srt.disaggregation.mooncake.hung_call import bytes_at, waits_for_one_of

DEVICE_FILES = "/dev/infiniband/uverbs"
# The system calls that reach a driver, by machine and number. The descriptor is their first argument.
DRIVER_CALLS = {"x86_64": {"1": "write", "16": "ioctl"}, "aarch64": {"64": "write", "29": "ioctl"}}


def a_thread_waits(sessions: Collection[str], machine: str = platform.machine()) -> Optional[bool]:
    """True if a thread of this process is in the driver of an RDMA device, or waits for what the peer of one of these
    sessions has to say; None where the kernel does not tell.
    """
    if machine not in DRIVER_CALLS:
        return None
    waits = None
    with contextlib.suppress(OSError):  # no /proc
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # the thread has ended, or there is no such file
                line = bytes_at(f"/proc/self/task/{thread}/syscall", 0, 256).decode()
                if waits := _is_in_driver(line, machine) or waits_for_one_of(line, sessions, machine):
                    break
    return waits


def _is_in_driver(line: str, machine: str) -> bool:
    words = line.split()  # of a thread that runs only one, or none
    if len(words) < 2 or words[0] not in DRIVER_CALLS[machine]:
        return False
    try:
        return os.readlink(f"/proc/self/fd/{int(words[1], 16)}").startswith(DEVICE_FILES)
    except OSError:  # closed meanwhile
        return False
