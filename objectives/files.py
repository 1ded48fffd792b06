"""Files that pass between the tuner and its ranks."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step: a reader sees the old file, the new one, or none, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def result_file(folder: Path, rank: int) -> Path:
    """Where a rank writes the result of the trial whose folder this is."""
    return folder / "ranks" / f"rank_{rank}.json"
