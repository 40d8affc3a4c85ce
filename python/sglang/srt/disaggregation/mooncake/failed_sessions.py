"""The blacklist: how does a set notice its own changes, and whom does it tell?

SGLang calls ``add``, ``discard``, ``remove``, ``clear`` and ``in``, always with ``session_lock`` held. So nothing here
takes a lock or blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Callable, Container, Hashable, Iterable
from typing import Any, Protocol

_in_set = set.__contains__  # looked up once: `in` runs for every chunk


class Listener(Protocol):
    """Who is told of changes, with ``session_lock`` held, after the set itself has changed: ``SessionWatch``."""

    @property
    def known(self) -> Container[Any]:
        """``requested`` is called for these sessions alone."""

    def failed(self, session: Any) -> None: ...
    def left(self, session: Any) -> None: ...
    def cleared(self) -> None: ...
    def requested(self, session: Any) -> None: ...
    def fault(self, session: Any, error: str) -> None: ...


def _in_place(update: Callable[..., None]) -> Any:
    def operator(self: FailedSessions, other: Any) -> FailedSessions:
        update(self, other)
        return self

    return operator


class FailedSessions(set[Any]):
    """SGLang's ``failed_sessions``. If the listener raises, it still is the set that SGLang expects."""

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
        """Takes the session off without telling the listener, which calls this itself."""
        super().discard(session)

    def clear(self) -> None:
        super().clear()
        self._tell(lambda _: self._listener.cleared(), None)

    def pop(self) -> Any:
        session = super().pop()
        self._tell(self._listener.left, session)
        return session

    def update(self, *others: Iterable[Hashable]) -> None:
        for session in itertools.chain(*others):
            self.add(session)

    def difference_update(self, *others: Iterable[Hashable]) -> None:
        for session in list(itertools.chain(*others)):
            self.discard(session)

    def intersection_update(self, *others: Iterable[Hashable]) -> None:
        self.difference_update(set(self) - set(self).intersection(*others))

    def symmetric_difference_update(self, other: Iterable[Hashable]) -> None:
        other = set(other)
        only_there = other - set(self)
        self.difference_update(other)
        self.update(only_there)

    __ior__, __isub__ = _in_place(update), _in_place(difference_update)
    __iand__, __ixor__ = _in_place(intersection_update), _in_place(symmetric_difference_update)

    # A copy is a plain set, which tells nobody.

    def copy(self) -> set[Any]:
        return set(self)

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        return set, (list(self),)

    def __or__(self, other: Any) -> set[Any]:
        return set(self).union(other)

    def union(self, *others: Iterable[Hashable]) -> set[Any]:
        return set(self).union(*others)

    def __contains__(self, session: object) -> bool:
        if session in self._known:
            self._tell(self._listener.requested, session)
        return _in_set(self, session)

    def _tell(self, method: Callable[[Any], None], session: Any) -> None:
        try:
            method(session)
        except Exception:
            with contextlib.suppress(Exception):  # there may be no memory left
                self._listener.fault(session, traceback.format_exc())
