"""What becomes of the requests that keep coming during a fault and after it?"""

from __future__ import annotations

import time

from kit.node import Node

EVERY_S = 0.05


class Requests:
    """Requests of one prefill node to one decode node.

    ``lost`` counts those whose transfer failed after the first failure, which blacklists the session; a refused request
    is not lost by us.
    """

    def __init__(self, prefill: Node, decode: Node) -> None:
        self._prefill, self._decode = prefill, decode
        self.lost = 0

    def first_fails(self) -> None:
        """A transfer fails because of the fault, which blacklists the session."""
        assert "Failed to send" in self._prefill.send_to(self._decode)

    def first_is_said_to_fail(self) -> None:
        """As if a transfer had failed: for a fault that is over, or harmless, before a transfer gives up."""
        self._prefill.ask("fail", [self._decode.session])

    def keep_coming(self, seconds: float) -> int:
        """For so long; gives how many were served."""
        served = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            served += self._one_is_served()
            time.sleep(EVERY_S)
        return served

    def until_served(self, deadline_s: float) -> float | None:
        """Until one is; gives the seconds that took, None if it took longer than the deadline."""
        began = time.monotonic()
        while time.monotonic() < began + deadline_s:
            if self._one_is_served():
                return time.monotonic() - began
            time.sleep(0.01)
        return None

    def _one_is_served(self) -> bool:
        why_not = self._prefill.send_to(self._decode)
        self.lost += "Failed to send" in why_not
        return why_not == ""
