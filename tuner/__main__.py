"""`python -m tuner`."""

import sys

INTERRUPTED = 130

try:
    from tuner.cli import main  # takes half a second, in which Ctrl-C is to end this as quietly as later on

    status = main()
except KeyboardInterrupt:
    status = INTERRUPTED
sys.exit(status)
