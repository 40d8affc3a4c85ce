"""Which wheels of Mooncake are installed, and which release of it can do what?"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

FIRST_MOONCAKE_THAT_ANSWERS = "0.3.10.post2"
FIRST_MOONCAKE_WITH_PROBE = "0.3.11"
FIRST_MOONCAKE_WITH_BOUND = "0.3.12"  # connects no longer than MC_HANDSHAKE_CONNECT_TIMEOUT
SHORT_QUEUE = re.compile(r" 0\.3\.13(\.post1)?$")
FIRST_MOONCAKE_WITH_SAFE_QUEUE = "0.3.14"
QUEUE_VARIABLE, LONGEST_QUEUE = "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", 65535
LONG_QUEUE = f"{QUEUE_VARIABLE}={LONGEST_QUEUE}"
TENT_VARIABLES = ("MC_USE_TENT", "MC_USE_TEV1")
UNSET_TENT = f"unset {' and '.join(TENT_VARIABLES)}"
LEAVE_TENT = f"{UNSET_TENT}, or install a Mooncake with its PR 4081 (September 2026)"


class Wheel(NamedTuple):
    """An installed wheel of Mooncake."""

    name: str
    release: str
    metadata: pathlib.Path  # its .dist-info folder

    def __str__(self) -> str:
        return f"{self.name} {self.release}"


def wheels_beside(package: pathlib.Path) -> Iterator[Wheel]:
    """The wheels of Mooncake that are installed beside this package."""
    for metadata in sorted(package.parent.glob("*mooncake*.dist-info")):
        name, _, release = metadata.stem.rpartition("-")  # what is in there may be unreadable
        yield Wheel(name.replace("_", "-"), release, metadata)
