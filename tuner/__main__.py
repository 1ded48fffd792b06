"""`python -m ds_tune.tuner`, and the command `ds-tune`."""

import sys

INTERRUPTED = 130

INTERRUPTED_LINE = "ds-tune: interrupted"
"""Says so where nothing else does, such as when a program waits for a document."""


def run() -> int:
    """Returns the exit status."""
    try:
        from ds_tune.tuner.cli import main  # takes half a second, in which Ctrl-C is to end this as it does later on

        return main()
    except KeyboardInterrupt:
        print(INTERRUPTED_LINE, file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
