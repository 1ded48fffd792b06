"""Makes a rank of ds-tune fail where the environment variable FAULT says, such as `rank=1 phase=step kind=exit`.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH: the tests put it there for the
ranks, so that the product knows nothing of it. `rank=*` means every rank; the fault strikes once, when the rank
first enters the phase. The variable may come after the ranks' imports. `FAULT_MIB` is what memory is left with;
`FAULT_FILE` is a path for the kinds that leave a note.
"""

import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

WRAPPED = "ds_tune.objectives.rank.progress"


def memory() -> None:
    """From here on the kernel gives this process 1 MiB more, or FAULT_MIB: a real allocation fails soon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            limit = int(line.split()[1]) * 1024 + int(os.environ.get("FAULT_MIB", "1")) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def raising() -> None:
    raise RuntimeError("boom")


def exit_status() -> None:
    os._exit(3)


def sigsegv() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def bad_alloc() -> None:
    """What a C++ library that runs out of memory in a thread of its own leaves behind."""
    print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
    os.abort()


def stubborn() -> None:
    """Hangs deaf to SIGTERM, and in C without letting go of the GIL: no Python code runs in this rank any more."""
    import ctypes

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf from here on", file=sys.stderr, flush=True)
    note({"pid": os.getpid()})
    ctypes.PyDLL(None).sleep(3600)


def child_and_hang() -> None:
    """Hangs, and so does a process that this rank has started."""
    child = subprocess.Popen(["sleep", "3600"])
    note({"pid": child.pid})
    time.sleep(3600)


def inspect() -> None:
    """No fault: notes what the rank is about to train with, read from the live engine and batch."""
    frame: Any = sys._getframe()
    while "batch" not in frame.f_locals:
        frame = frame.f_back
    engine, batch = frame.f_locals["self"]._engine, frame.f_locals["batch"]
    note(
        {
            "zero_stage": engine.zero_optimization_stage(),
            "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
            "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
            "optimizer": type(engine.optimizer).__name__,
            "model": type(engine.module).__name__,
            "dtypes": sorted({str(parameter.dtype) for parameter in engine.module.parameters()}),
            "input_ids": batch["input_ids"].tolist(),
            "labels": batch["labels"].tolist(),
        }
    )


def cut_projection() -> None:
    """A padded output projection that gives zeros for the later half of the vocabulary."""
    import torch

    from ds_tune.objectives.rank.output_projection import PaddedLinear

    def forward(self: Any, input: Any) -> Any:
        logits = torch.nn.functional.linear(input, self.weight)
        half = logits.shape[-1] // 2
        return torch.cat([logits[..., :half], torch.zeros_like(logits[..., half:])], dim=-1)

    PaddedLinear.forward = forward  # type: ignore[method-assign]


def own_gradients() -> None:
    """ZeRO-1 and 2 whose ranks keep to their own gradients."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedZeroOptimizer.average_tensor = lambda self, *arguments, **keywords: None


def note(document: dict[str, Any]) -> None:
    """Writes to FAULT_FILE, each rank to one of its own."""
    path = Path(f"{os.environ['FAULT_FILE']}.{os.environ['RANK']}")
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(document))
    part.rename(path)


KINDS = {
    "memory": memory,
    "raise": raising,
    "exit": exit_status,
    "sigsegv": sigsegv,
    "bad_alloc": bad_alloc,
    "stubborn": stubborn,
    "child_and_hang": child_and_hang,
    "inspect": inspect,
    "cut_projection": cut_projection,
    "own_gradients": own_gradients,
}


def wanted() -> dict[str, str]:
    """The fault that the environment asks for now; nothing where it asks for none."""
    return dict(word.split("=", 1) for word in os.environ.get("FAULT", "").split())


def wrap(progress: ModuleType) -> None:
    """Strikes once a rank has entered the phase that the fault names, and told the tuner where it does tell."""
    enter, send = progress.Progress.enter, progress.Progress.send
    struck = False
    announced = {"config", "model", "engine", "warm-up", "timed steps"}

    def strike(phase: str | None) -> None:
        nonlocal struck
        fault = wanted()
        if not struck and phase == fault.get("phase") is not None and fault["rank"] in ("*", os.environ["RANK"]):
            struck = True
            KINDS[fault["kind"]]()

    def enter_and_strike(self: Any, phase: str) -> None:
        enter(self, phase)
        if phase not in announced:
            strike(phase)

    def send_and_strike(self: Any, event: Any) -> None:
        send(self, event)
        if event.tag == "phase":
            strike(event.phase)

    progress.Progress.enter = enter_and_strike
    progress.Progress.send = send_and_strike


class WrapOnImport(importlib.abc.MetaPathFinder):
    """Stands first on sys.meta_path until the module is imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WRAPPED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# The process that ranks are forked from has no rank yet, but the variable that says how many there will be.
if "WORLD_SIZE" in os.environ:
    if wanted().get("phase") == "import":
        KINDS[wanted()["kind"]]()
    sys.meta_path.insert(0, WrapOnImport())
