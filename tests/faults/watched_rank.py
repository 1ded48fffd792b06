"""A real rank that writes down, after each trial, which simple variables of DeepSpeed's modules are not as before it.

WATCHED_FOLDER gets one JSON document a rank: for each trial the names with their values, before and after.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ds_tune.objectives.rank import worker


def state() -> dict[str, str]:
    """Values of plain variables, and how much is in containers, of every module of DeepSpeed that is there."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed") and module is not None:
            for key, value in list(vars(module).items()):
                if not key.startswith("__") and (shown := shown_value(value)) is not None:
                    found[f"{name}.{key}"] = shown
    return found


def shown_value(value: Any) -> str | None:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, dict | list | set):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, type) or callable(value) or type(value).__name__ == "module":
        return None
    return f"a {type(value).__name__}"


class WatchedWorker(worker.Worker):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._before = state()
        self._told: list[dict[str, list[str | None]]] = []

    def run(self, command: Any) -> None:
        super().run(command)
        after = state()
        changed = {
            name: [value, after[name]] for name, value in self._before.items() if after.get(name, value) != value
        }
        self._told.append(changed)
        Path(os.environ["WATCHED_FOLDER"], f"{os.environ['RANK']}.json").write_text(json.dumps(self._told))


def main() -> None:
    worker.Worker = WatchedWorker  # type: ignore[misc]
    worker.main()


if __name__ == "__main__":
    main()
