"""Ops that DeepSpeed would compile in the middle of a trial, once on a machine: its optimizer's and some knobs'."""

import contextlib
import fcntl
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.compile.util import get_deepcompile_handle
from deepspeed.ops.op_builder.dc import DeepCompileBuilder
from deepspeed.ops.op_builder.quantizer import QuantizerBuilder
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer
from torch.utils.cpp_extension import get_default_build_root

from ds_tune.objectives.errors import EnvironmentFault

COMPILE_SECONDS = 900.0
"""Seen: an optimizer's in 33 s beside an H200 and in two and a half minutes on two busy cores, DeepCompile's in more
than 100 s beside an H100."""

DEEPCOMPILE_RECURSION = 100_000
"""Its stage-3 pass walks the graph by recursion, a call a node (`get_node_requirements` in list_schedule.py); GPT2-xl
needs more than Python's 1,000. Such calls of Python to Python take none of the C stack."""

SAID_CHARACTERS = 200
"""Characters of a compiler's message to show; what it was called with is longer."""

MUON_MODULE = "deepspeed.runtime.zero.muon.muon_optimizer"
NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""Where it is "1", `torch.compile` returns functions as they are."""

SLOW_LOAD_SECONDS = 3.0
"""An op that is already compiled loads in less."""


def optimizer_op(ds_config: Mapping[str, Any]) -> str | None:
    """The builder of the op that DeepSpeed will use for a configuration's optimizer; None where it compiles none."""
    optimizer = ds_config.get("optimizer", {})
    if optimizer.get("type", "").lower() not in ("adam", "adamw") or optimizer.get("params", {}).get("torch_adam"):
        return None
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return "CPUAdamBuilder" if offload.get("device", "none") != "none" else "FusedAdamBuilder"


def load_optimizer_op(ds_config: Mapping[str, Any], notice: Callable[..., None], *, is_required: bool = True) -> None:
    """Compiles and loads the optimizer's op, if DeepSpeed has one for it: see `load_op`."""
    name = optimizer_op(ds_config)
    if name is None:
        return
    builder = get_accelerator().create_op_builder(name)
    instead = 'let `ds_config` set "torch_adam": true in the optimizer\'s params'
    load_op(builder.name, lambda: builder.load(verbose=False), notice, instead=instead, is_required=is_required)


def deepcompile_op() -> object:
    """Loads the op that DeepCompile's graphs call; its passes may recurse from now on."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), DEEPCOMPILE_RECURSION))
    return get_deepcompile_handle()


KNOB_OPS: dict[tuple[str, Any], tuple[str, Callable[[], object]]] = {
    ("compile", "deepcompile"): (DeepCompileBuilder.NAME, deepcompile_op),
    ("quantized_weights", "on"): (QuantizerBuilder.NAME, CUDAQuantizer),
}
"""By a knob and its value: the op's name, and what loads it as DeepSpeed does."""


def load_knob_op(field: str, value: Any, notice: Callable[..., None]) -> None:
    """Compiles and loads one of `KNOB_OPS`: see `load_op`."""
    name, load = KNOB_OPS[field, value]
    load_op(name, load, notice, instead=f"leave {field}={value} out")


def load_op(
    name: str, load: Callable[[], object], notice: Callable[..., None], *, instead: str, is_required: bool = True
) -> None:
    """Compiles and loads one of DeepSpeed's ops; rank 0 compiles while the others wait.

    Args:
        load: as DeepSpeed does it, compiled or not.
        notice: `Progress.notice`, called when it is going to take long.
        instead: what a user can do where it cannot be compiled.
        is_required: nothing can run without it. Of another it is only told that it cannot be compiled.

    Raises:
        EnvironmentFault: it is required and cannot be compiled here.
    """
    is_there = [True]
    if torch.distributed.get_rank() == 0:
        slow = threading.Timer(
            SLOW_LOAD_SECONDS,
            lambda: notice(
                f"Compiling DeepSpeed's {name}, once on this machine; it takes a minute or two.",
                seconds=COMPILE_SECONDS,
            ),
        )
        slow.start()
        try:
            with sole_builder(name):
                load()
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            said = next((line for line in lines if "error: " in line), lines[0])[:SAID_CHARACTERS]
            fault = EnvironmentFault(
                f"DeepSpeed's {name} cannot be compiled ({said}): it needs a C++ compiler, and for GPUs the "
                f"CUDA toolkit; or {instead}"
            )
            if is_required:
                raise fault from error
            notice(f"{fault}. Trials that need it will fail.", seconds=COMPILE_SECONDS)
            is_there = [False]
        finally:
            slow.cancel()
    torch.distributed.broadcast_object_list(is_there)  # the others wait here
    if is_there[0]:
        load()


def import_muon(ds_config: Mapping[str, Any]) -> None:
    """Imports DeepSpeed's Muon without torch's compiler where it is not the optimizer.

    DeepSpeed 0.19.8 imports it for a process's first engine, to see that its optimizer is not that one. Three of its
    functions are decorated with `torch.compile`, which loads torch's inductor for nothing else: 1.6 s of a first trial
    on a CPU; on the host of an H200 the first engine took 4 s longer than later ones.
    """
    if MUON_MODULE in sys.modules or ds_config.get("optimizer", {}).get("type", "").lower() == "muon":
        return
    before = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    try:
        with contextlib.suppress(ImportError):  # other releases of DeepSpeed have none
            importlib.import_module(MUON_MODULE)
    finally:
        if before is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = before


@contextlib.contextmanager
def sole_builder(name: str) -> Iterator[None]:
    """Compiles an op alone, and after a compilation that was killed clears away what it left.

    torch marks a compilation with a file `lock` and waits for ever for one that nobody will remove. Whoever holds
    our lock and finds our mark knows that the ds-tune which made both is gone, and that the file is nobody's.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    mark = root / f".ds-tune-builds-{name}"
    with (root / f".ds-tune-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if mark.exists():
            for left in [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]:
                left.unlink(missing_ok=True)
        mark.touch()
        yield
        mark.unlink()
