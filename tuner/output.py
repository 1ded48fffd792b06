"""Where a person reads: standard output or error, and how wide its lines are."""

import os

import rich.console

PIPE_COLUMNS = 120
"""Where nobody says how wide a line may be."""


def output(*, stderr: bool = False) -> rich.console.Console:
    """Standard output, or standard error where the output belongs to a document."""
    on_terminal = rich.console.Console(stderr=stderr).is_terminal
    known = on_terminal or "COLUMNS" in os.environ
    return rich.console.Console(stderr=stderr, width=None if known else PIPE_COLUMNS)
