"""What does a client see of each request, while so many a second go to a router?"""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time

DEADLINE_S = 90.0
BODY = {
    "input_ids": [5, 6, 7, 8, 9, 10],
    "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
}


@dataclasses.dataclass(frozen=True)
class Request:
    """How one request went, on the clock of time.monotonic(). `decode`: who gave the answer, if one of them did."""

    sent: float
    ended: float
    served: bool
    said: str
    decode: str = ""


class Clients:
    """Sends requests to a router, from begin() to stop(), whatever becomes of those before."""

    def __init__(self, port: int, streaming: bool, per_s: float = 2.0) -> None:
        self._port, self._streaming, self._pause_s = port, streaming, 1 / per_s
        self._requests: list[Request] = []  # appended to by many threads
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Send the first request."""
        self._threads = [threading.Thread(target=self._go_on, daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """Send no more."""
        self._over.set()

    def wait(self) -> None:
        """Wait for the answers to those that are on their way, after stop()."""
        for thread in self._threads:  # the first, which starts the others, ends first
            thread.join()

    def requests(self) -> list[Request]:
        """Those that have ended."""
        return list(self._requests)

    def on_their_way(self) -> int:
        """So many wait for their answers."""
        return len(self._threads) - 1 - len(self._requests)

    def _go_on(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            thread = threading.Thread(
                target=lambda: self._requests.append(ask(self._port, self._streaming)), daemon=True
            )
            self._threads.append(thread)
            thread.start()
            due += self._pause_s


def ask(port: int, streaming: bool) -> Request:
    """Send one request and see it through."""
    sent = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        body = json.dumps({**BODY, "stream": streaming})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        served, said, decode = judged(answer.status, text, streaming)
    except (OSError, http.client.HTTPException) as error:
        served, said, decode = False, f"{type(error).__name__}: {error}", ""
    finally:
        connection.close()
    return Request(sent, time.monotonic(), served, said, decode)


def judged(status: int, text: str, streaming: bool) -> tuple[bool, str, str]:
    """Whether an answer is one, what it says if it is not, and which decode node gave it.

    HTTP 200 proves nothing: of a streaming request that failed, the last event has a finish reason of type abort.
    """
    if status != 200:
        return False, f"HTTP {status}: {text}", ""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    whole = [event for event in events if event != "[DONE]"][-1:] if streaming else [text]
    try:
        meta = json.loads(whole[0])["meta_info"]
        reason, decode = meta["finish_reason"], str(meta.get("weight_version", ""))
    except (IndexError, KeyError, TypeError, ValueError):
        return False, f"HTTP 200, cut short: {text}", ""
    if reason is None or reason["type"] == "abort":
        return False, f"HTTP 200, aborted: {reason and reason.get('message')}", decode
    return True, "", decode
