"""Does a thread of this process wait for an RDMA connection to be made? That holds up transfers to others.

Mooncake makes connections in the thread that posts all transfers of a device. Over RoCE the driver, here and on the
peer's side, looks up the address of the other device, and waits a second for one on the same network that does not
reply: here the thread is in a call to the driver, or it waits for the peer's answer to the handshake. Where the address
is known, be it a router's, it does not wait.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection
from typing import NamedTuple, Optional

from sglang.srt.disaggregation.mooncake.hung_call import bytes_at, waits_for_one_of

DEVICE_FILES = "/dev/infiniband/uverbs"
# The system calls that reach a driver, by machine and number. The descriptor is their first argument.
DRIVER_CALLS = {"x86_64": {"1": "write", "16": "ioctl"}, "aarch64": {"64": "write", "29": "ioctl"}}


class Samples(NamedTuple):
    """How often it was looked whether a thread waits, and how often one did."""

    looks: int
    waits: int

    def share_since(self, before: Samples) -> float:
        """The share of the time in between for which a thread waited; 1 where it is not known."""
        looks = self.looks - before.looks
        return (self.waits - before.waits) / looks if looks else 1.0


class RdmaWaits:
    """Samples what the threads of this process do. Any one thread at a time."""

    # A read of a peer that cannot be reached takes 10 s, so that is twenty looks. One costs 20 to 30 us a thread: with
    # 300 threads that is 2 % of a core while a read is pending.
    _SAMPLE_EVERY_S = 0.5

    def __init__(self, clock: Callable[[], float], a_thread_waits: Callable[[Collection[str]], Optional[bool]]) -> None:
        self._clock = clock
        self._a_thread_waits = a_thread_waits
        self._next_at = 0.0
        self.samples = Samples(0, 0)

    def sample(self, sessions: Callable[[], Collection[str]]) -> None:
        """Looks once more whether one waits for these, if the last time is long enough ago. Hold no session_lock."""
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + self._SAMPLE_EVERY_S
        waits = self._a_thread_waits(sessions())
        if waits is not None:
            self.samples = Samples(self.samples.looks + 1, self.samples.waits + waits)


def a_thread_waits(sessions: Collection[str], machine: str = platform.machine()) -> Optional[bool]:
    """True if a thread of this process is in the driver of an RDMA device, or waits for what the peer of one of these
    sessions has to say; None where the kernel does not tell.
    """
    if machine not in DRIVER_CALLS:
        return None
    told = False
    for thread in _threads():
        try:
            line = bytes_at(f"/proc/self/task/{thread}/syscall", 0, 256).decode()
        except OSError:  # the thread has ended, or there is no such file
            continue
        told = True
        if _is_in_driver(line, machine) or waits_for_one_of(line, sessions, machine):
            return True
    return False if told else None


def _threads() -> list[str]:
    try:
        return os.listdir("/proc/self/task")
    except OSError:  # no /proc
        return []


def _is_in_driver(line: str, machine: str) -> bool:
    words = line.split()  # of a thread that runs only one, or none
    if len(words) < 2 or words[0] not in DRIVER_CALLS[machine]:
        return False
    try:
        return os.readlink(f"/proc/self/fd/{int(words[1], 16)}").startswith(DEVICE_FILES)
    except OSError:  # closed meanwhile
        return False
