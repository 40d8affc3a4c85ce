"""The blacklist: how does a set hear its own changes, and whom does it tell?

SGLang calls ``add``, ``discard``, ``remove``, ``clear`` and ``in``, always with ``session_lock`` held. So what is here
takes no lock and never blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Callable, Container, Hashable, Iterable
from typing import Any, Protocol

_in_set = set.__contains__  # looked up once: `in` runs for every chunk


class Listener(Protocol):
    """Who is told of changes. Each method is called with ``session_lock`` held, after the set itself has changed."""

    @property
    def known(self) -> Container[Any]:
        """``in`` is told of these sessions alone."""

    def failed(self, session: Any) -> None:
        """A transfer to the session failed: it was added, be it for the first time or again."""

    def left(self, session: Any) -> None:
        """The session was taken off, because its peer registered again."""

    def cleared(self) -> None:
        """All sessions were taken off."""

    def requested(self, session: Any) -> None:
        """A request looked the session up."""

    def fault(self, session: Any, error: str) -> None:
        """One of the others raised; ``error`` is the traceback."""


class FailedSessions(set[Any]):
    """SGLang's ``failed_sessions``. A fault of the listener leaves SGLang with a plain set."""

    __slots__ = ("__dict__", "_known")  # a slot is found sooner than an entry of __dict__

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._known = listener.known

    def add(self, session: Hashable) -> None:
        """A transfer to the session failed."""
        super().add(session)
        self._tell(self._listener.failed, session)

    def discard(self, session: Hashable) -> None:
        """The session registered again."""
        super().discard(session)
        self._tell(self._listener.left, session)

    def remove(self, session: Hashable) -> None:
        """As ``discard``; raises KeyError if the session is not blacklisted."""
        super().remove(session)
        self._tell(self._listener.left, session)

    def take_off(self, session: Hashable) -> None:
        """Takes the session off without telling: for the listener's own use."""
        super().discard(session)

    def clear(self) -> None:
        """Takes every session off."""
        super().clear()
        self._tell(lambda _: self._listener.cleared(), None)

    def pop(self) -> Any:
        """Removes and returns some session; raises KeyError if there is none."""
        session = super().pop()
        self._tell(self._listener.left, session)
        return session

    def update(self, *others: Iterable[Hashable]) -> None:
        """Adds every session of the others."""
        for session in itertools.chain(*others):
            self.add(session)

    def difference_update(self, *others: Iterable[Hashable]) -> None:
        """Discards every session of the others."""
        for session in list(itertools.chain(*others)):
            self.discard(session)

    def intersection_update(self, *others: Iterable[Hashable]) -> None:
        """Discards every session that is not in all of the others."""
        self.difference_update(set(self) - set(self).intersection(*others))

    def symmetric_difference_update(self, other: Iterable[Hashable]) -> None:
        """Discards the sessions that are in the other, and adds those that were only there."""
        other = set(other)
        only_there = other - set(self)
        self.difference_update(other)
        self.update(only_there)

    def __ior__(self, other: Any) -> FailedSessions:
        self.update(other)
        return self

    def __isub__(self, other: Any) -> FailedSessions:  # type: ignore[misc]
        self.difference_update(other)
        return self

    def __iand__(self, other: Any) -> FailedSessions:  # type: ignore[misc]
        self.intersection_update(other)
        return self

    def __ixor__(self, other: Any) -> FailedSessions:  # type: ignore[misc]
        self.symmetric_difference_update(other)
        return self

    # A copy is a plain set: nobody listens to it.

    def copy(self) -> set[Any]:
        """The sessions that are blacklisted now."""
        return set(self)

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        return set, (list(self),)

    def __or__(self, other: Any) -> set[Any]:
        return set(self).union(other)

    def union(self, *others: Iterable[Hashable]) -> set[Any]:
        """The sessions that are blacklisted now, and all of the others."""
        return set(self).union(*others)

    def __contains__(self, session: object) -> bool:
        """True if the session is blacklisted."""
        if session in self._known:
            self._tell(self._listener.requested, session)
        return _in_set(self, session)

    def _tell(self, method: Callable[[Any], None], session: Any) -> None:
        try:
            method(session)
        except Exception:
            with contextlib.suppress(Exception):  # there may be no memory to tell it
                self._listener.fault(session, traceback.format_exc())
