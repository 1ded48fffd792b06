"""Words of sentences for a person: a value that is wrong, a count with its noun."""

from typing import Any

MOST_SHOWN = 60
"""Characters of a wrong value; more would hide the sentence around it."""


def shown(value: Any) -> str:
    """A value for a message: in one line, short, and without what a terminal would obey."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def plain(value: Any) -> str:
    """The same, but a short text as it stands, without quotes: for what a person typed."""
    is_short = isinstance(value, str) and value.isprintable() and len(value) <= MOST_SHOWN
    return value if is_short else shown(value)


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless there is one."""
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
