"""How is what comes from outside written, so that it can neither forge a line nor reach a terminal's controls?"""

from __future__ import annotations

# A session id is cut only if its host is longer than any name can be.
_MOST = 300


def printable(text: str, most: int = _MOST) -> str:
    """The text, cut after ``most`` characters, and escaped if any of them is not printable."""
    cut = text[:most]
    return (cut if cut.isprintable() else repr(cut)[1:-1]) + ("[...]" if len(text) > most else "")


def printable_repr(value: object) -> str:
    """As ``printable``, of the ``repr`` of anything. Raises nothing."""
    try:
        return printable(repr(value))
    except Exception:
        return f"a {type(value).__name__}"
