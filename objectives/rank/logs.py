"""Log files of a rank."""

import os
import sys
from pathlib import Path


def log_to(folder: Path) -> None:
    """Sends everything that is printed from here on, by C++ libraries too, to the trial's log files."""
    for name, stream in (("stdout.log", sys.stdout), ("stderr.log", sys.stderr)):
        stream.flush()
        target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, stream.fileno())
        os.close(target)
