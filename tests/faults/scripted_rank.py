"""Stands in for a rank where a test is about processes and pipes only: runs RANK_SCRIPT, and starts in no time.

The script finds the names below: `rank`, `send(event, **fields)`, `receive()`, `result(folder, document)`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

rank = -1


def send(event: str, **fields: Any) -> None:
    os.write(int(os.environ["DS_TUNE_EVENT_FD"]), json.dumps({"event": event, **fields}).encode() + b"\n")


def receive() -> dict[str, Any]:
    return json.loads(sys.stdin.readline())


def result(folder: str, document: dict[str, Any]) -> None:
    path = Path(folder) / "ranks" / f"rank_{rank}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def main() -> None:
    global rank
    rank = int(os.environ["RANK"])
    exec(os.environ["RANK_SCRIPT"], globals())


if __name__ == "__main__":
    main()
