"""Backends that answer a study's trials: ranks that train here, a recording, or the cost model.

`ds_tune.tuner.backends` chooses among them.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ds_tune.objectives.cost_model.hardware import Hardware, machine_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.simulated import SimulatedObjective
from ds_tune.objectives.ds_document import precision_of
from ds_tune.objectives.ds_file import DsFile, read_ds_file
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.loss_scale import STAGE_0_LEFT_OUT, forgets_loss_scale
from ds_tune.objectives.machine import DEFAULT_CPU_RANKS, Machine, detect_machine
from ds_tune.objectives.objective import Objective
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.recorded.replay import ReplayObjective
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.first_look import with_first_look
from ds_tune.objectives.running.launcher import Launcher
from ds_tune.objectives.running.launchers import DEFAULT_LAUNCHER, LAUNCHERS
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan
from ds_tune.objectives.trial import Failure, TrialConfig
from ds_tune.objectives.workload.huggingface import (
    SHIPPED_MODELS,
    HuggingFaceWorkload,
    check_workload,
    trained_instead,
)
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.tuner.finals import Verification
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.own_file import (
    MODELS_OWN,
    OwnConfiguration,
    Precision,
    file_notes,
    lets_batch_go,
    limits_around,
    own_of,
    precision_for,
)
from ds_tune.tuner.request import SearchRequest, TuneRequest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Values that differ between a run on GPUs and the same request on a CPU."""

    model: str
    dtype: str
    seq_len: int
    max_micro_batch: int
    max_samples_per_rank: int
    """Bounds the global batch, and with it the seconds of one step."""


DEFAULTS = {
    "cuda": Defaults(model="gpt2-xl", dtype="fp16", seq_len=1024, max_micro_batch=64, max_samples_per_rank=128),
    "cpu": Defaults(model="gpt2-nano", dtype="fp32", seq_len=128, max_micro_batch=16, max_samples_per_rank=32),
}

Objectives: TypeAlias = tuple[Objective, Verification | None]
"""Objective of the search, and what verifies; None where there is nothing that could run again."""

MakeObjectives: TypeAlias = Callable[[ResultsFolder, Callable[[str], None], contextlib.ExitStack], Objectives]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The machine and the training that trials are of, and who answers them."""

    machine: Machine
    workload: Workload
    limits: Limits
    objectives: MakeObjectives
    """Makes them for a results folder; the second argument is told in one line what a person should know, and the third
    gives back what outlives both."""
    verifies: bool = False
    """Whether there is something to run the finalists again."""
    restricted_to: Sequence[TrialConfig] | None = None
    """The only configurations that can be answered; None for all within the limits."""
    own: TrialConfig | None = None
    """The configuration that a person trains with today."""
    recording: str | None = None
    """Which recording answers, where one does."""
    versions: Mapping[str, str] | None = None
    """The software that the figures are of, where it is not what is installed here."""
    keep: Callable[[ResultsFolder], None] = lambda results: None
    """Keeps what was found out so far in the results folder; called when that has turned out to be the study's."""
    notes: Sequence[str] = ()
    """Lines for the person before the study begins."""


def measured(request: TuneRequest, say: Callable[[str], None]) -> Backend:
    """Real training, in ranks on this machine.

    Args:
        say: told in one line what takes a while.
    """
    machine = detect_machine(
        gpus=request.gpus,
        cpu_ranks=request.ranks or DEFAULT_CPU_RANKS,
        memory_cap_bytes=request.memory_cap_bytes,
    )
    capability = machine.compute_capability
    has_bf16 = capability is None or int(capability.partition(".")[0]) >= FIRST_WITH_BF16
    job = job_of(request, machine.device, has_bf16=has_bf16)
    workload = job.workload
    own = job.own(machine, request)
    limits = job.limits(own, request, machine)
    notes = job.notes(own, limits)
    if machine.device == "cpu":
        notes.insert(
            0,
            f"No GPU in use: real DeepSpeed on {machine.ranks} CPU ranks with {workload.title}; "
            "what is fastest here need not be on a GPU.",
        )

    if forgets_loss_scale(0, workload.dtype):
        notes.append(STAGE_0_LEFT_OUT)
    workload = with_first_look(workload, say)
    if workload.data is not None:
        notes.append(f"Data: {workload.data.words}.")
        if workload.counting:
            notes.append(f"{workload.counting}.")
    if (instead := trained_instead(workload)) is not None:
        notes.append(instead)

    return Backend(
        machine=machine,
        workload=workload,
        limits=limits,
        own=own.config,
        objectives=training_objectives(request, workload, machine, LAUNCHERS[DEFAULT_LAUNCHER]),
        verifies=True,
        notes=notes,
    )


def training_objectives(
    request: TuneRequest,
    workload: Workload,
    machine: Machine,
    launcher_of: Callable[[Machine], Launcher],
    *,
    fresh_ranks: bool = False,
) -> MakeObjectives:
    """Objectives that really train; see `Backend.objectives`.

    Args:
        fresh_ranks: give every trial of the search processes of its own, too.
    """

    def objectives(
        results: ResultsFolder, notice: Callable[[str], None], resources: contextlib.ExitStack
    ) -> Objectives:
        launcher = resources.enter_context(launcher_of(machine))
        searching, verifying = (
            DeepSpeedObjective(
                workload,
                machine,
                launcher=launcher,
                log_folder=results.process_logs.resolve(),
                trial_seconds=request.trial_seconds,
                plan=plan,
                fresh_ranks=fresh,
                notice=notice,
            )
            for plan, fresh in ((StepPlan(), request.fresh_ranks or fresh_ranks), (PRECISE, True))
        )
        return searching, Verification(fresh=verifying, training=searching)

    return objectives


def limits_of(request: SearchRequest, machine: Machine) -> Limits:
    """The batch sizes to search, as far as the request does not bound them by the machine's defaults."""
    defaults = DEFAULTS[machine.device]
    return request.limits(
        machine.ranks,
        max_micro_batch=defaults.max_micro_batch,
        max_global_batch=defaults.max_samples_per_rank * machine.ranks,
    )


FIRST_WITH_BF16 = 8
"""Compute capability of the first GPUs that have bf16, its major part."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training of a built-in model, and the file that it comes from."""

    workload: HuggingFaceWorkload
    precision: Precision
    file: DsFile | None

    def own(self, machine: Machine, request: SearchRequest) -> OwnConfiguration:
        """The configuration that the file describes.

        Raises:
            UsageError: see `own_of`.
        """
        if self.file is None:
            return OwnConfiguration(config=None, holds_batch=False)
        return own_of(self.file, self.workload, machine, request)

    def limits(self, own: OwnConfiguration, request: SearchRequest, machine: Machine) -> Limits:
        """The batch sizes to search."""
        limits = limits_of(request, machine)
        if own.config is None:
            return limits
        return limits_around(own.config, limits, holds_batch=own.holds_batch and not lets_batch_go(request))

    def notes(self, own: OwnConfiguration, limits: Limits) -> list[str]:
        """What a person should know of it."""
        if self.file is not None:
            return file_notes(self.file, self.precision, own, limits)
        from_model = self.precision.origin == MODELS_OWN
        return [f"Precision: {self.precision.dtype}, from {MODELS_OWN}."] if from_model else []


def job_of(request: SearchRequest, device: str, *, has_bf16: bool = True) -> Job:
    """The training job that a request describes, on a kind of device.

    Raises:
        UsageError: the model, the data or the precision cannot be what was meant.
    """
    defaults = DEFAULTS[device]
    file = read_ds_file(request.ds_config) if request.ds_config else None
    workload = HuggingFaceWorkload(
        model=_as_path(request.model) if request.model else defaults.model,
        seq_len=request.seq_len or defaults.seq_len,
        dtype=request.dtype or defaults.dtype,  # until the model's configuration has been read
        pretrained=request.pretrained,
        dataset=_as_path(request.dataset) if request.dataset else None,
        text_column=request.text_column,
        packing=request.packing is not False,
        tokenizer=_as_path(request.tokenizer) if request.tokenizer else None,
        base_ds_config=file.document if file else {},
    )
    check_workload(workload)
    runs = {"fp32", *(["bf16"] if has_bf16 else []), *(["fp16"] if device == "cuda" else [])}
    is_said = request.dtype is not None or precision_of(workload.base_ds_config) is not None
    model = None if is_said else _configuration_of(workload)
    precision = precision_for(request.dtype, workload.base_ds_config, model, defaults.dtype, runs=runs)
    if device == "cpu" and precision.dtype == "fp16":
        raise UsageError("`dtype=fp16` needs a GPU: DeepSpeed on a CPU trains in fp32 or bf16")
    return Job(workload=dataclasses.replace(workload, dtype=precision.dtype), precision=precision, file=file)


def _configuration_of(workload: HuggingFaceWorkload) -> Mapping[str, Any] | None:
    """The model's configuration; None where it cannot be had, which whoever needs more of it will say."""
    try:
        return workload.model_document()
    except UsageError:
        return None


def imagined_workload(request: SearchRequest, hardware: Hardware) -> HuggingFaceWorkload:
    """The training job that a request describes, on GPUs that need not be here.

    Raises:
        UsageError: see `job_of`; or the GPUs lack the precision.
    """
    return imagined_job(request, hardware).workload


def imagined_job(request: SearchRequest, hardware: Hardware) -> Job:
    """The job of `imagined_workload`, which see."""
    has_bf16 = hardware.device == "cpu" or hardware.accelerator.has_bf16
    job = job_of(request, hardware.device, has_bf16=has_bf16)
    if job.workload.dtype == "bf16" and not has_bf16:
        raise UsageError(f"`dtype=bf16`: {hardware.accelerator.name} has no bf16; use fp16")
    return job


def _as_path(name: str) -> str:
    """An existing file or folder by its absolute path, so that ranks and commands find it from anywhere.

    Links are not followed: in a hub's cache they lead to files without an ending.
    """
    return os.path.abspath(name) if name not in SHIPPED_MODELS and Path(name).exists() else name


def simulated(request: TuneRequest, hardware: Hardware) -> Backend:
    """The cost model's own figures, with errors and noise."""
    machine = machine_of(hardware)
    job = imagined_job(request, hardware)
    workload, own = job.workload, job.own(machine, request)
    limits = job.limits(own, request, machine)
    model = CostModel(workload, hardware)
    notes = [
        *job.notes(own, limits),
        f"Simulated: a cost model of {hardware.name} answers, with errors and noise; nothing is run.",
    ]
    if hardware.nodes_words is not None:
        notes.append(hardware.nodes_words)
    if forgets_loss_scale(0, workload.dtype):
        notes.append(STAGE_0_LEFT_OUT)
    if (instead := trained_instead(workload)) is not None:
        notes.append(instead)
    return Backend(
        machine=machine,
        workload=workload,
        limits=limits,
        own=own.config,
        objectives=lambda results, notice, resources: (SimulatedObjective(model, machine, request.seed), None),
        # Another seed is another machine: its deviations from the formulas are drawn from it.
        recording=f"simulated machine {request.seed}",
        notes=notes,
    )


def replayed(request: TuneRequest, path: Path) -> Backend:
    """Nothing but what was recorded, on the machine that it was recorded on."""
    recording = read_recording(path)
    ranks = recording.machine.ranks
    return Backend(
        machine=recording.machine,
        workload=recording.workload,
        limits=request.limits(
            ranks,
            max_micro_batch=max(config.micro_batch_size for config in recording.outcomes),
            max_global_batch=max(config.global_batch_size(ranks) for config in recording.outcomes),
        ),
        objectives=lambda results, notice, resources: (ReplayObjective(recording), None),
        restricted_to=tuple(recording.outcomes),
        recording=recording.fingerprint,
        versions=recording.versions,
        notes=[_recording_words(path, recording)],
    )


def _recording_words(path: Path, recording: Recording) -> str:
    """Says what was read, and what of it is not used."""
    out_of_memory = sum(isinstance(outcome, Failure) for outcome in recording.outcomes.values())
    text = f"{path}: {len(recording.outcomes)} recorded configurations ({out_of_memory} out of memory); nothing is run."
    left_out = []
    if recording.repeated:
        left_out.append(f"{recording.repeated} that differ from an earlier line in nothing known here")
    if recording.crashed:
        left_out.append(f"{recording.crashed} that crashed")
    return f"{text} Lines left out: {', '.join(left_out)}." if left_out else text
