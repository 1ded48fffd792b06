"""Backend of a person's own training script: how it is started, what it trains, and what of it can be changed."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.ds_document import WRITTEN_BY_FILE, switched_off
from ds_tune.objectives.ds_file import shared_samples
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.loss_scale import forgets_loss_scale
from ds_tune.objectives.machine import DEFAULT_CPU_RANKS, Machine, detect_machine
from ds_tune.objectives.running.early_environment import early_environment
from ds_tune.objectives.running.launch_line import read_launch_line
from ds_tune.objectives.running.launcher import Launcher
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.trial import KNOBS, TrialConfig
from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload, read_ds_config
from ds_tune.storage.layout import ResultsFolder
from ds_tune.tuner.autotuning_block import with_autotuning_block
from ds_tune.tuner.backend import Backend, MakeObjectives, Objectives, limits_of, training_objectives
from ds_tune.tuner.first_run import FirstRun, first_run
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.own_file import at_global_batch, lets_batch_go, limits_around
from ds_tune.tuner.reports.markdown import duration_words
from ds_tune.tuner.request import TuneRequest
from ds_tune.tuner.space import Space, study_space

SCRIPT_WORKER = "ds_tune.objectives.rank.script.worker"

PREPARATIONS = 5.0
"""Times the seconds of the first run that a trial may take."""


def _launcher_of(workload: ScriptWorkload) -> Callable[[Machine], Launcher]:
    """Launcher of ranks whose libraries were imported under the variables that the script sets for them."""
    return functools.partial(LocalLauncher, worker=SCRIPT_WORKER, environment=workload.start.early)


def scripted(request: TuneRequest, say: Callable[[str], None]) -> Backend:
    """Runs the script as it stands for a few steps, and so finds out what it trains.

    Args:
        say: told in one line what takes a while.

    Raises:
        UsageError: the line launches no script, or the script does not train under DeepSpeed.
        EnvironmentFault: the machine does not say what it has.
    """
    start, ranks = read_launch_line(request.script)
    machine = _machine(request, ranks)
    if ranks is not None and machine.ranks != ranks:
        raise UsageError(f"the launch line starts {ranks} ranks, and {machine.ranks} were asked for; leave one out")
    request, said = with_autotuning_block(request, _autotuning_block(start))
    start = dataclasses.replace(start, early=early_environment(start))
    workload = ScriptWorkload(start=start, mapped=request.mapped)
    shown = first_run(workload, machine, _launcher_of(workload), ResultsFolder(request.results), say)
    workload = dataclasses.replace(workload, facts=shown.facts)
    own = _own(workload, request, machine)
    limits = _limits(request, own, machine)
    fixed = None if workload.batch_follows else _of_micro_batch(own, request, limits, workload, machine)
    return Backend(
        machine=machine,
        workload=workload,
        limits=limits,
        objectives=_objectives(request, workload, machine, shown),
        keep=shown.remember,
        verifies=True,
        restricted_to=fixed,
        own=own,
        notes=[*_notes(workload, own, limits, machine, request, is_fixed=fixed is not None), *said],
    )


def _machine(request: TuneRequest, ranks: int | None) -> Machine:
    """The ranks to train on.

    Args:
        ranks: as many as the launch line starts; None where it does not say.
    """
    cpu_ranks = request.ranks or ranks or DEFAULT_CPU_RANKS
    gpus = request.gpus
    if gpus is None and ranks is not None:
        # Where there are none the line's ranks are on the CPU, as they are without a launcher.
        has_gpus = detect_machine(gpus=None, cpu_ranks=cpu_ranks, memory_cap_bytes=None).device == "cuda"
        gpus = ranks if has_gpus else 0
    return detect_machine(gpus=gpus, cpu_ranks=cpu_ranks, memory_cap_bytes=request.memory_cap_bytes)


def _objectives(request: TuneRequest, workload: ScriptWorkload, machine: Machine, shown: FirstRun) -> MakeObjectives:
    """Objectives that run the script; what its first run showed is kept as soon as there is a folder for it."""
    # What it does before it trains is in each trial.
    longest = max(request.trial_seconds, PREPARATIONS * shown.seconds)
    inner = training_objectives(
        dataclasses.replace(request, trial_timeout=request.trial_timeout or longest), workload, machine,
        _launcher_of(workload), fresh_ranks=True,
    )  # fmt: skip

    def objectives(
        results: ResultsFolder, notice: Callable[[str], None], resources: contextlib.ExitStack
    ) -> Objectives:
        return inner(results, each_once(notice), resources)

    return objectives


def each_once(notice: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on what trials say, but not what an earlier one has said with other figures."""
    said: set[str] = set()

    def once(text: str) -> None:
        key = re.sub(r"\d+ \w+", "", text)
        if key not in said:
            said.add(key)
            notice(text)

    return once


def _autotuning_block(start: ScriptStart) -> Any:
    index = start.ds_config_argument()
    if index is None:
        return None
    document = read_ds_config(Path(start.folder, start.arguments[index].rpartition("=")[2]))
    return (document or {}).get("autotuning")


def _own(workload: ScriptWorkload, request: TuneRequest, machine: Machine) -> TrialConfig:
    """The configuration that the script trains with, at the global batch that was asked for if one was.

    Raises:
        UsageError: it loses its gradients, or cannot have that batch.
    """
    facts = workload.known
    if forgets_loss_scale(facts.zero_stage, facts.dtype):
        raise UsageError(
            f"{workload.title} trains in fp16 at ZeRO stage {facts.zero_stage}, where the installed DeepSpeed loses "
            "the gradients: set zero_optimization.stage to 1, or use bf16 "
            "(docs/log/2026-11-30-stage-0-fp16-loses-gradients.md)"
        )
    if (mistake := shared_samples(facts.ds_config)) is not None:
        raise UsageError(f"The DeepSpeed configuration of {workload.title}: {mistake}")
    core = {
        "zero_stage": facts.zero_stage,
        "micro_batch_size": facts.micro_batch_size,
        "gradient_accumulation_steps": facts.gradient_accumulation_steps,
    }
    # On a CPU an offload to the host is no other place.
    knobs = {
        field: value
        for field, value in workload.own_knobs.items()
        if machine.device == "cuda" or field not in WRITTEN_BY_FILE
    }
    own = TrialConfig.from_json({**core, **knobs})
    return at_global_batch(own, request.global_batch, machine.ranks, whose="script's")


def _limits(request: TuneRequest, own: TrialConfig, machine: Machine) -> Limits:
    """The batch sizes to search, which the script's own are among.

    Its global batch is its training: it is held, unless it may go.
    """
    return limits_around(own, limits_of(request, machine), holds_batch=not lets_batch_go(request))


def _of_micro_batch(
    own: TrialConfig, request: TuneRequest, limits: Limits, workload: ScriptWorkload, machine: Machine
) -> Sequence[TrialConfig]:
    """The configurations with the script's own micro-batch size."""
    space: Space = study_space(
        limits, preset=request.preset or "core", allowed=request.allowed, workload=workload, machine=machine, own=own
    )
    return [config for config in space.legal if config.micro_batch_size == own.micro_batch_size]


def _notes(
    workload: ScriptWorkload,
    own: TrialConfig,
    limits: Limits,
    machine: Machine,
    request: TuneRequest,
    *,
    is_fixed: bool,
) -> list[str]:
    """What was recognised."""
    facts, samples, out_of_reach = workload.known, own.global_batch_size(machine.ranks), workload.out_of_reach
    batch = f"{own.micro_batch_size} × {own.gradient_accumulation_steps} × {machine.ranks} = {samples} samples a step"
    lines = [
        f"{workload.description}; as it stands ZeRO-{own.zero_stage}, {batch}. DeepSpeed at {facts.initialized_at}."
    ]
    if facts.tokens_per_sample is not None and not facts.counting:
        lines.append(f"Samples of {facts.tokens_per_sample} tokens.")
    offered = [field for field in KNOBS if KNOBS[field].speed and field in set(facts.model_knobs) - out_of_reach]
    if offered and request.preset is None and request.space is None:
        lines.append(f"`preset=speed` would also search knobs of its model: {', '.join(offered)}.")
    if facts.counting:
        lines.append(f"{facts.counting}.")
    if facts.engines > 1:
        lines.append(f"It makes {facts.engines} DeepSpeed engines; the first that trains is tuned, the others stay.")
    reached = [f"{flag}" for flag in workload.flags.values()]
    if workload.start.ds_config_argument() is not None:
        reached.insert(0, "its DeepSpeed file")
    lines.append(f"Settings reach it by {', '.join(reached) or 'its call of deepspeed.initialize'}.")
    if is_fixed:
        lines.append(
            f"Its micro-batch size stays {own.micro_batch_size}: no option of it was found that sets it; name one with "
            "`map=train_micro_batch_size_per_gpu=--OPTION`."
        )
    if facts.prepare_seconds >= 1:
        lines.append(
            f"Imports are paid for once; what it does before it trains, {duration_words(facts.prepare_seconds)} in the "
            "first run, is in each trial."
        )
    held = f"The global batch is held at {limits.global_batch}; `free_batch` lets it go." if limits.global_batch else ""
    if off := switched_off(facts.ds_config):
        lines.append(f"Off in trials, kept in what is exported: {', '.join(off)}.")
    lines.append(f"Left out of trials: checkpoints, trackers, uploads and evaluation. {held}".strip())
    return lines
