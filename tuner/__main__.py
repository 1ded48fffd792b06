"""`python -m tuner`, and the command `ds-tune`."""

import sys

EXIT_INTERRUPTED = 130


def run() -> int:
    """Returns the exit status, also of a Ctrl-C while the commands are imported, which takes half a second."""
    try:
        from tuner.cli import main

        return main()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
