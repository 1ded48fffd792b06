"""What answers a study's trials, as the command line chose it: ranks that train here, a recording, or the cost model.

Another way to answer is one more function that returns `Backend`, and its line in `backend_for`.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ds_tune.objectives.cost_model.hardware import Hardware, machine_of, parse_hardware
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.simulated import SimulatedObjective
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import DEFAULT_CPU_RANKS, Machine, detect_machine
from ds_tune.objectives.objective import Objective
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.recorded.replay import ReplayObjective
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launchers import DEFAULT_LAUNCHER, LAUNCHERS
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan
from ds_tune.objectives.trial import Failure, TrialConfig
from ds_tune.objectives.workload.huggingface import (
    SHIPPED_MODELS,
    HuggingFaceWorkload,
    check_workload,
    load_base_ds_config,
)
from ds_tune.tuner.arguments import TRAINING_OPTIONS, given
from ds_tune.tuner.finals import Verification
from ds_tune.tuner.spec import DEFAULTS, StudySpec, parse_memory

Objectives: TypeAlias = tuple[Objective, Verification | None]
"""Whom the search asks, and who verifies; None where there is nothing that could run again."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The machine and the training that trials are of, and who answers them."""

    machine: Machine
    workload: HuggingFaceWorkload
    max_micro_batch: int
    """Unless the user says otherwise, as is the next."""
    max_global_batch: int
    objectives: Callable[[StudySpec, Callable[[str], None], contextlib.ExitStack], Objectives]
    """Makes them for a study; the second argument is told in one line what a person should know, and the third gives
    back what outlives both."""
    restricted_to: Sequence[TrialConfig] | None = None
    """See `StudySpec`, as for the next two."""
    recording: str | None = None
    versions: Mapping[str, str] | None = None
    notes: Sequence[str] = ()
    """Lines for the person before the study begins."""


def backend_for(arguments: argparse.Namespace) -> Backend:
    """
    Raises:
        UsageError: what was asked for cannot be.
        EnvironmentFault: the machine does not say what it has.
    """
    if arguments.replay is not None:
        return _replayed(arguments)
    if arguments.simulate:
        return _simulated(arguments)
    if arguments.hardware is not None:
        raise UsageError(
            "--hardware imagines GPUs; add --simulate to search on them, or use tune plan --hardware to see what fits"
        )
    return _measured(arguments)


def _measured(arguments: argparse.Namespace) -> Backend:
    """Real training, in ranks on this machine."""
    cap = parse_memory(arguments.memory_cap) if arguments.memory_cap else None
    if arguments.gpus is not None and arguments.gpus < 0:
        raise UsageError(f"--gpus {arguments.gpus}: a number of GPUs, or 0 for the CPU")
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=arguments.ranks or DEFAULT_CPU_RANKS, memory_cap_bytes=cap)
    defaults = DEFAULTS[machine.device]
    workload = HuggingFaceWorkload(
        model=_as_path(arguments.model) if arguments.model else defaults.model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
        pretrained=arguments.pretrained,
        dataset=_as_path(arguments.dataset) if arguments.dataset else None,
        tokenizer=_as_path(arguments.tokenizer) if arguments.tokenizer else None,
        base_ds_config=load_base_ds_config(arguments.ds_config) if arguments.ds_config else {},
    )
    check_workload(workload)
    notes = []
    if machine.device == "cpu":
        if workload.dtype == "fp16":
            raise UsageError("--dtype fp16 needs a GPU: DeepSpeed on a CPU trains in fp32 or bf16")
        notes.append(
            f"No GPU in use: real DeepSpeed on {machine.ranks} CPU ranks with {workload.title}; "
            "what is fastest here need not be on a GPU."
        )

    def objectives(spec: StudySpec, notice: Callable[[str], None], resources: contextlib.ExitStack) -> Objectives:
        launcher = resources.enter_context(LAUNCHERS[DEFAULT_LAUNCHER](spec.machine))
        searching, verifying = (
            DeepSpeedObjective(
                spec.workload,
                spec.machine,
                launcher=launcher,
                log_folder=spec.results.process_logs.resolve(),
                trial_seconds=spec.trial_seconds,
                plan=plan,
                fresh_ranks=fresh_ranks,
                notice=notice,
            )
            for plan, fresh_ranks in ((StepPlan(), arguments.fresh_ranks), (PRECISE, True))
        )
        return searching, Verification(fresh=verifying, training=searching)

    return Backend(
        machine=machine,
        workload=workload,
        max_micro_batch=defaults.max_micro_batch,
        max_global_batch=defaults.max_samples_per_rank * machine.ranks,
        objectives=objectives,
        notes=notes,
    )


def _as_path(name: str) -> str:
    """An existing file or folder by its absolute path, so that ranks and commands find it from anywhere."""
    return str(Path(name).resolve()) if name not in SHIPPED_MODELS and Path(name).exists() else name


NOT_SIMULATED = (
    "dataset", "tokenizer", "pretrained", "gpus", "ranks", "trial_timeout", "fresh_ranks",
)  # fmt: skip
"""Options that only mean something where ranks train."""


def _simulated(arguments: argparse.Namespace) -> Backend:
    """The cost model's own figures, with errors and noise."""
    refused = given(arguments, NOT_SIMULATED)
    if refused:
        raise UsageError(f"--simulate does not go with {', '.join(refused)}: nothing is trained; leave out one")
    if arguments.hardware is None:
        raise UsageError("--simulate needs to know on what: add --hardware, such as --hardware 16xV100-32GB")
    cap = parse_memory(arguments.memory_cap) if arguments.memory_cap else None
    hardware = parse_hardware(arguments.hardware, memory_cap_bytes=cap)
    machine = machine_of(hardware)
    workload = imagined_workload(arguments, hardware)
    model = CostModel(workload, hardware)
    defaults = DEFAULTS[hardware.device]
    return Backend(
        machine=machine,
        workload=workload,
        max_micro_batch=defaults.max_micro_batch,
        max_global_batch=defaults.max_samples_per_rank * machine.ranks,
        objectives=lambda spec, notice, resources: (SimulatedObjective(model, machine, spec.seed), None),
        # Another seed is another machine: its deviations from the formulas are drawn from it.
        recording=f"simulated machine {arguments.seed}",
        notes=[f"Simulated: a cost model of {hardware.name} answers, with errors and noise; nothing is run."],
    )


def imagined_workload(arguments: argparse.Namespace, hardware: Hardware) -> HuggingFaceWorkload:
    """The training job of `--simulate` and of `tune plan`, where there is no data.

    Raises:
        UsageError: the model or the precision cannot be what was meant.
    """
    defaults = DEFAULTS[hardware.device]
    ds_config = getattr(arguments, "ds_config", None)
    workload = HuggingFaceWorkload(
        model=_as_path(arguments.model) if arguments.model else defaults.model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
        base_ds_config=load_base_ds_config(ds_config) if ds_config else {},
    )
    check_workload(workload)
    if workload.dtype == "bf16" and not hardware.accelerator.has_bf16:
        raise UsageError(f"--dtype bf16: {hardware.accelerator.name} has no bf16; use fp16")
    return workload


def _replayed(arguments: argparse.Namespace) -> Backend:
    """Nothing but what was recorded, on the machine that it was recorded on."""
    refused = given(arguments, TRAINING_OPTIONS)
    if refused:
        raise UsageError(
            f"--replay does not go with {', '.join(refused)}: the recording says what was trained on what; "
            "leave out one or the other"
        )
    recording = read_recording(arguments.replay)
    ranks = recording.machine.ranks
    return Backend(
        machine=recording.machine,
        workload=recording.workload,
        max_micro_batch=max(config.micro_batch_size for config in recording.outcomes),
        max_global_batch=max(config.global_batch_size(ranks) for config in recording.outcomes),
        objectives=lambda spec, notice, resources: (ReplayObjective(recording), None),
        restricted_to=tuple(recording.outcomes),
        recording=recording.fingerprint,
        versions=recording.versions,
        notes=[_recording_words(arguments.replay, recording)],
    )


def _recording_words(path: Path, recording: Recording) -> str:
    """What was read, and what of it is not used."""
    out_of_memory = sum(isinstance(outcome, Failure) for outcome in recording.outcomes.values())
    text = f"{path}: {len(recording.outcomes)} recorded configurations ({out_of_memory} out of memory); nothing is run."
    left_out = []
    if recording.repeated:
        left_out.append(f"{recording.repeated} that differ from an earlier line in nothing known here")
    if recording.crashed:
        left_out.append(f"{recording.crashed} that crashed")
    return f"{text} Lines left out: {', '.join(left_out)}." if left_out else text
