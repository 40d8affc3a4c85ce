"""What has a fault cost the clients of a router? Requests are counted; nothing is waited for here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .clients import Request

# Who still fails so shortly before the end of the watch is taken to fail for good.
STILL_S = 3.0


@dataclasses.dataclass(frozen=True)
class Tally:
    """What was lost, and how long clients waited. None: there is no such moment."""

    requests: int
    failed: int
    failed_after_heal: int
    last_failure_s: float | None  # after the heal
    over: bool  # nobody failed any more at the end
    slowest_served_s: float
    slowest_failed_s: float
    again_s: float | None  # after the heal, a request to the decode node that was cut off is served

    def __str__(self) -> str:
        last = "" if self.last_failure_s is None else f", the last {self.last_failure_s:.1f} s later"
        return f"{self.failed} of {self.requests} FAILED{last if self.over else ', still failing'}"


def tally(requests: Sequence[Request], healed: float, ended: float, decode: str) -> Tally:
    """Counts the `requests`, of which those after the moment `ended` were not sent any more.

    `decode` was cut off until the moment `healed`; where it never was healed, that is the moment of the fault.
    """
    failed = [each for each in requests if not each.served]
    served = [each for each in requests if each.served]
    late = [each.ended - healed for each in failed if each.ended > healed]
    again = [each.ended - healed for each in served if each.decode == decode and each.ended > healed]
    return Tally(
        len(requests),
        len(failed),
        len(late),
        max(late, default=None),
        all(each.sent < ended - STILL_S for each in failed),
        max((each.ended - each.sent for each in served), default=0.0),
        max((each.ended - each.sent for each in failed), default=0.0),
        min(again, default=None),
    )
