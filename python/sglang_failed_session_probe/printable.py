"""How is a text from outside shown, so that it can neither forge a line nor control the terminal?"""

from __future__ import annotations


def printable(text: str, most: int = 300) -> str:  # no host name is so long that a session id would be cut
    """The text, cut after ``most`` characters, and escaped if any of them is not printable."""
    cut = text[:most]
    return (cut if cut.isprintable() else repr(cut)[1:-1]) + ("[...]" if len(text) > most else "")


def printable_repr(value: object) -> str:
    """As ``printable``, of the ``repr`` of anything. Raises nothing."""
    try:
        return printable(repr(value))
    except Exception:
        return f"a {type(value).__name__}"
