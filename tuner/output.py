"""Where a person reads: standard output or error, and how wide its lines are."""

import codecs
import os
import sys

import rich.console

PIPE_COLUMNS = 120
"""Where nobody says how wide a line may be."""


PLAIN = {
    "×": "x", "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MINUS SIGN}": "-", "…": "...", "±": "+-", "·": ".", "★": "*",
    "≈": "~", "≤": "<=", "≥": ">=",
}  # fmt: skip
"""What is written for characters that a terminal lacks; for any other a question mark, or a line of ASCII's."""

_LINES = {"│": "|", "┃": "|", "║": "|"}


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_plain(character) for character in lacking), error.end


def _plain(character: str) -> str:
    if "\u2500" <= character <= "\u257f":  # of tables
        return _LINES.get(character, "-")
    return PLAIN.get(character, "?")


def replace_what_is_lacking() -> None:
    """Has both streams write something plain for what their encoding lacks, where Python would give up."""
    codecs.register_error("ds-tune-plain", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="ds-tune-plain")


def output(*, stderr: bool = False) -> rich.console.Console:
    """Standard output, or standard error where the output belongs to a document."""
    on_terminal = rich.console.Console(stderr=stderr).is_terminal
    known = on_terminal or "COLUMNS" in os.environ
    return rich.console.Console(stderr=stderr, width=None if known else PIPE_COLUMNS)
