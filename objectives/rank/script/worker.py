"""A rank that runs a person's training script once, in a process of its own that ends with the run.

Like `objectives.rank.worker` it is forked from a process that has done the imports, gets its commands on standard input
and answers with events; then it becomes the script.
"""

import argparse
import contextlib
import json
import os
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import numpy
import torch
import transformers
import transformers.integrations.deepspeed
import transformers.trainer

from ds_tune.objectives.cost_model.architecture import architecture_of
from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.errors import DsTuneError, UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank.device import cap_memory, claim_device, lift_cap, local_rank, meter_for
from ds_tune.objectives.rank.distributed import skip_unused_ops
from ds_tune.objectives.rank.logs import log_to
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.rank.script.blame import place_of, print_traceback, sentence_of
from ds_tune.objectives.rank.script.data import Loaders
from ds_tune.objectives.rank.script.laid_on import lay_on_what_trains
from ds_tune.objectives.rank.script.listeners import (
    Learner,
    Listening,
    LossRecorder,
    Timer,
    facts_of,
)
from ds_tune.objectives.rank.script.observer import Observer
from ds_tune.objectives.rank.script.quick_weights import make_weights_quickly
from ds_tune.objectives.rank.script.quiet import leave_out_side_effects
from ds_tune.objectives.rank.script.replaced import around
from ds_tune.objectives.rank.script.settings import Settings
from ds_tune.objectives.running.failures import kind_of_exception
from ds_tune.objectives.running.launcher import SCRATCH
from ds_tune.objectives.running.protocol import (
    Failed,
    Finished,
    Learn,
    Losses,
    Ready,
    Refused,
    Setup,
    Time,
    decode_command,
)
from ds_tune.objectives.trial import Failure
from ds_tune.objectives.words import counted
from ds_tune.objectives.workload.script import (
    ACCUMULATION_FLAGS,
    MICRO_BATCH_FLAGS,
    ScriptStart,
    ScriptWorkload,
)

PREPARE_SECONDS = 1800.0
"""A script that has not made its engine by then hangs: it may load a model and tokenize data first."""

IMPORTED_BEFORE_THE_FORK = (transformers.trainer, transformers.integrations.deepspeed, accelerate)
"""Modules that take seconds to import, which no trial pays for."""

STARTS_RANKS = (
    (torch.multiprocessing, "spawn"),
    (torch.multiprocessing, "start_processes"),
    (accelerate, "notebook_launcher"),
    (accelerate.launchers, "notebook_launcher"),
    (accelerate, "debug_launcher"),
)
"""Functions by which scripts start ranks of their own."""


class ScriptRank:
    """One rank about to run a script."""

    def __init__(self, workload: ScriptWorkload, machine: Machine, progress: Progress) -> None:
        self._workload = workload
        self._machine = machine
        self._progress = progress
        self._device = claim_device(machine, local_rank())
        self._meter = meter_for(self._device)
        self._options: dict[str, Any] = {}
        """Options of the script's own parser that may be batch sizes, with their values."""
        self._spelled: set[str] = set()
        """All options of its parsers."""

    def run(self, command: Time | Losses | Learn) -> NoReturn:
        """Runs the script and tells the tuner what was wanted of it, or why there is nothing."""
        log_to(command.log_folder)
        config = None if isinstance(command, Learn) else command.config
        settings = Settings(config, self._machine.ranks)
        listener = self._listener(command, settings)
        observer = self._observer = Observer(settings, listener)
        scratch = command.log_folder / SCRATCH / f"rank{local_rank()}"
        scratch.mkdir(parents=True, exist_ok=True)
        leave_out_side_effects(scratch)
        settings.install()
        if config is not None and (knobs := self._workload.laid_on(config)):
            lay_on_what_trains(knobs)
        observer.install()
        is_trial = isinstance(command, Time)
        Loaders(settings, observer, listener, ended=self._data_ended if is_trial else lambda steps: None).install()
        around(argparse.ArgumentParser, "parse_known_args", self._parsed)
        for owner, name in STARTS_RANKS:
            around(owner, name, self._started_ranks)
        if self._machine.device == "cpu":
            skip_unused_ops()
            around(accelerate.PartialState, "_prepare_backend", _gloo)
        start = self._workload.start
        if config is not None:
            ds_config = self._ds_config_file(config, command.log_folder)
            start = self._workload.started_with(ds_config, config)
        match command:
            case Losses():
                seed_generators()
            case Time():
                make_weights_quickly()
        self._progress.announce("script", seconds=PREPARE_SECONDS)
        cap_memory(self._machine)
        try:
            become_script(start)
        except SystemExit as ended:
            if ended.code not in (None, 0):
                self._fail(UsageError(f"it ended with status {ended.code}"))
            if listener.engine is None:
                self._fail(UsageError("it ended by sys.exit before it called deepspeed.initialize"))
        except EOFError:
            self._fail(UsageError("it waits for input, and in a trial nobody types: have it take that from an option"))
        except BaseException as error:
            self._fail(error)
        self._fail(UsageError(self._ended_early(listener)))

    def _listener(self, command: Time | Losses | Learn, settings: Settings) -> Listening:
        common: dict[str, Any] = {"finish": self._finish, "fail": self._fail}
        match command:
            case Time():
                return Timer(
                    self._progress, self._meter, command=command, ranks=self._machine.ranks,
                    flops_per_sample=self._flops_per_sample(), facts=self._workload.known, **common,
                )  # fmt: skip
            case Losses():
                return LossRecorder(self._progress, self._meter, command=command, **common)
            case Learn():
                return Learner(
                    self._progress, self._meter, **common,
                    facts=lambda seen: facts_of(
                        seen, self._observer, settings, flags=self._flags(seen)
                    ),
                )  # fmt: skip

    def _data_ended(self, steps: int) -> None:
        if local_rank() == 0:
            when = f"after {counted(steps, 'step')}" if steps else "before the first step is whole"
            self._progress.notice(f"Its data ends {when} and is begun again in trials.", seconds=0.0)

    def _flops_per_sample(self) -> float:
        tokens = self._workload.tokens_per_sample
        try:
            return architecture_of(self._workload).flops_per_sample(tokens) if tokens else 0.0
        except UsageError:
            return 0.0

    def _parsed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found, rest = original(*args, **kwargs)
        known = {*MICRO_BATCH_FLAGS, *ACCUMULATION_FLAGS}
        for action in args[0]._actions:
            self._spelled.update(action.option_strings)
            for option in action.option_strings:
                if option.replace("-", "_").replace("__", "--", 1) in known:
                    self._options[option] = getattr(found, action.dest, None)
        return found, rest

    def _started_ranks(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        self._fail(
            UsageError(
                f"it starts its ranks itself, by {original.__name__}: have it train in the process that it is started "
                "in, as torchrun and deepspeed launch it"
            )
        )

    def _flags(self, seen: Listening) -> dict[str, str]:
        """Options whose values are the batch sizes that the script trained with.

        Does not return where an option that the person has named is none of the script's.
        """
        if self._spelled and (unknown := sorted({*self._workload.mapped.values()} - self._spelled)):
            self._fail(UsageError(f"`map` names {unknown[0]}, which is no option of it"))
        fields = {
            "micro_batch_size": (MICRO_BATCH_FLAGS, seen.engine.train_micro_batch_size_per_gpu()),
            "gradient_accumulation_steps": (ACCUMULATION_FLAGS, seen.engine.gradient_accumulation_steps()),
        }
        found = {}
        for field, (flags, size) in fields.items():
            for flag in flags:
                spelled = [option for option in (flag, flag.replace("_", "-")) if self._options.get(option) == size]
                if spelled:
                    found[field] = spelled[0]
                    break
        return found

    def _ds_config_file(self, config: Any, folder: Path) -> Path | None:
        if self._workload.start.ds_config_argument() is None:
            return None
        path = folder / f"ds_config.rank{local_rank()}.json"
        machine = self._machine
        document = deepspeed_config(config, self._workload, ranks=machine.ranks, device=machine.device)
        write_atomically(path, json.dumps(document, indent=2))
        return path

    def _ended_early(self, listener: Listening) -> str:
        if listener.engine is None:
            return (
                "it never calls deepspeed.initialize with a model to train: launch it as you do for DeepSpeed, with "
                "the options that turn DeepSpeed on"
            )
        return (
            f"it ended after {listener.steps} optimizer steps, too few to time: have it train longer, or on more data"
        )

    def _finish(self, result: Any) -> NoReturn:
        self._progress.send(Finished(result=result))
        self._end()

    def _fail(self, error: BaseException) -> NoReturn:
        lift_cap(self._machine)
        print_traceback(error)
        phase = self._progress.phase
        rank = local_rank()
        failure = Failure(
            kind=kind_of_exception(error, phase),
            message=f"rank {rank} in {phase}: {sentence_of(error)}",
            phase=phase,
            rank=rank,
            peak_memory_bytes=self._meter.peak_memory_bytes(),
            raised=place_of(error),
        )
        self._progress.send(Failed(failure=failure))
        self._end()

    def _end(self) -> NoReturn:
        """Ends the process at once: `finally` and `atexit` of the script would save, upload, or wait."""
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def seed_generators() -> None:
    """Has a script that sets no seed begin alike each time; one that does overrules it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def become_script(start: ScriptStart) -> None:
    """Runs a script as the interpreter would: its folder first on the path, its arguments, nothing to read."""
    os.environ.update(start.environment)
    os.chdir(start.folder)
    if (socket := os.environ.pop("DS_TUNE_RENDEZVOUS_FD", None)) is not None:
        os.close(int(socket))  # the script listens on its port
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    arguments = list(start.arguments)
    if start.local_rank_flag is not None:
        arguments.insert(0, f"{start.local_rank_flag}={local_rank()}")
    sys.argv = [start.program, *arguments]
    if start.is_module:
        sys.path.insert(0, start.folder)
        runpy.run_module(start.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(start.program).parent))
        runpy.run_path(start.program, run_name="__main__")


def _gloo(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """Accelerate connects the ranks of DeepSpeed on a CPU with nothing at all."""
    _, kind = original(*args, **kwargs)
    return "gloo", kind


def main() -> None:
    progress = Progress(int(os.environ.pop("DS_TUNE_EVENT_FD")))
    setup = decode_command(sys.stdin.readline())
    assert isinstance(setup, Setup)
    workload = setup.context.workload
    assert isinstance(workload, ScriptWorkload)
    try:
        rank = ScriptRank(workload, setup.context.machine, progress)
    except DsTuneError as error:
        progress.send(Refused(message=str(error), usage=isinstance(error, UsageError)))
        return
    progress.send(Ready())
    command = decode_command(sys.stdin.readline())
    assert not isinstance(command, Setup)
    rank.run(command)


if __name__ == "__main__":
    main()
