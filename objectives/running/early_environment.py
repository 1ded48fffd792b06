"""Variables that a script sets above its imports, such as HF_HOME: libraries read them when they are imported.

Ranks are forked from a process that has imported them, so that process has to know: the script is run by itself up to
its first import of such a library, and there writes down what it has set.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.running.job_environment import without_job
from ds_tune.objectives.workload.script import ScriptStart

PROBE_SECONDS = 60.0
"""Python starts in a tenth of a second, torch is imported in some; a script that does more before is not waited for."""

READERS = ("huggingface_hub", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "peft", "trl")
"""Packages that read variables when they are imported."""

TORCH = "torch"
"""Reads later what it reads. But who imports it is about to train, and may import none of the others: it is passed only
where the script sets a variable between it and one of them."""

OF_A_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
"""Variables that every launcher sets, for a script that looks at them early."""

_SETS = re.compile(r"environ\s*\[[^\]]*\]\s*=(?!=)|environ\.(?:update|setdefault)|environ\s*\|=|putenv|load_dotenv")
_IMPORTS_TORCH = re.compile(r"^\s*(?:import|from)\s+torch\b", re.MULTILINE)
_IMPORTS_READER = re.compile(rf"^\s*(?:import|from)\s+(?:{'|'.join(READERS)})\b", re.MULTILINE)

PROBE = """\
import json, os, sys
before = dict(os.environ)
class Probe:
    def find_spec(self, name, path=None, target=None):
        if name in {ends!r}:
            with open({told!r} + ".part", "w") as file:
                json.dump({{name: value for name, value in os.environ.items() if before.get(name) != value}}, file)
            os.rename(file.name, {told!r})
            os._exit(0)
sys.meta_path.insert(0, Probe())
"""


def early_environment(start: ScriptStart) -> dict[str, str]:
    """Variables that a script has set, to other values than it was given, when it first imports one of `READERS`.

    Raises:
        UsageError: it chooses GPUs so, which its ranks have by then.
    """
    if not (start.is_module or any(_SETS.search(text) for text in _code(start))):
        return {}
    ends = READERS if not start.is_module and _sets_behind_torch(_text(Path(start.program))) else (*READERS, TORCH)
    with tempfile.TemporaryDirectory(prefix="ds-tune-probe-") as scratch:
        told = Path(scratch, "told.json")
        Path(scratch, "sitecustomize.py").write_text(PROBE.format(ends=ends, told=str(told)))
        _run(start, scratch)
        if not told.exists():
            return {}  # it imports none of them, or fails before: its first run tells
        found: dict[str, str] = json.loads(told.read_text())
    if (chosen := found.get("CUDA_VISIBLE_DEVICES")) is not None:
        raise UsageError(
            f"{Path(start.program).name} sets CUDA_VISIBLE_DEVICES={chosen}: write that in front of bin/tune, and "
            "leave it out of the script"
        )
    return {name: value for name, value in found.items() if name not in {*OF_A_RANK, "MASTER_PORT"}}


def _code(start: ScriptStart) -> Iterator[str]:
    """A script's text, and that of the modules beside it."""
    program = Path(start.program)
    for path in {program, *program.parent.glob("*.py")}:
        yield _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _sets_behind_torch(text: str) -> bool:
    """Whether a script sets a variable after it has imported torch, and before it imports what reads such."""
    torch = _IMPORTS_TORCH.search(text)
    if torch is None:
        return False
    reader, sets = _IMPORTS_READER.search(text, torch.end()), _SETS.search(text, torch.end())
    return reader is not None and sets is not None and sets.start() < reader.start()


def _run(start: ScriptStart, site: str) -> None:
    """Runs a script as one rank, silently, with a `sitecustomize` of a folder, for as long as that lets it."""
    paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment: Mapping[str, str] = {
        **without_job(os.environ), **OF_A_RANK, **start.environment, "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    local_rank = [] if start.local_rank_flag is None else [f"{start.local_rank_flag}=0"]
    module = ["-m"] if start.is_module else []
    with subprocess.Popen(
        [sys.executable, *module, start.program, *local_rank, *start.arguments],
        cwd=start.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PROBE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
