"""`python -m ds_tune.tuner`, and the command `ds-tune`."""

import sys

INTERRUPTED = 130


def run() -> int:
    """Returns the exit status."""
    try:
        from ds_tune.tuner.cli import main  # takes half a second, in which Ctrl-C is to end this as quietly as later on

        return main()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
