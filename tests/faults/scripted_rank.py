"""Stands in for a rank where a test is about processes and pipes only: runs RANK_SCRIPT, and starts in no time.

The script finds the names below: `rank`, `send(event, **fields)`, `receive()`, `finish()` and
`fail(kind, message, phase)`.
"""

import json
import os
import sys
from typing import Any

rank = -1


def send(event: str, **fields: Any) -> None:
    os.write(int(os.environ["DS_TUNE_EVENT_FD"]), json.dumps({"event": event, **fields}).encode() + b"\n")


def receive() -> dict[str, Any]:
    return json.loads(sys.stdin.readline())


def finish(loss: float | None = None) -> None:
    """Ends a command with the losses that tell this rank from its peers."""
    send("finished", curve={"losses": [float(rank) if loss is None else loss], "skipped_steps": 0})


def fail(kind: str, message: str, phase: str) -> None:
    failure = {"type": "failure", "kind": kind, "message": message, "phase": phase, "rank": rank}
    send("failed", failure={**failure, "peak_memory_bytes": 7})


def main() -> None:
    global rank
    rank = int(os.environ["RANK"])
    exec(os.environ["RANK_SCRIPT"], globals())


if __name__ == "__main__":
    main()
