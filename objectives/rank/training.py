"""One trial on this rank: configuration, model, engine, warm-up, timed steps."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import deepspeed
import torch
import transformers

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank.data import batches
from ds_tune.objectives.rank.device import Meter
from ds_tune.objectives.rank.distributed import slowest
from ds_tune.objectives.rank.knobs import apply_to_engine, apply_to_model, configure_model
from ds_tune.objectives.rank.model import build_model, count_parameters, flops_per_sample
from ds_tune.objectives.rank.ops import COMPILE_SECONDS, KNOB_OPS, load_knob_op
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.timing.deadlines import BUILD_SECONDS, predicted_step_seconds, timed_deadline, warmup_deadline
from ds_tune.objectives.timing.intervals import is_drifting, step_ci95, warmup_length
from ds_tune.objectives.timing.step_parts import FEWEST_MICRO_STEPS, StepParts, whole_step
from ds_tune.objectives.timing.step_plan import StepPlan, is_hopeless
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import Workload

MAX_SKIPPED_STEPS = 24
"""fp16's dynamic loss scale halves at each overflow; from 2^16 it cannot halve more often and still be one."""


Marks: TypeAlias = tuple[Any, Any, Any, Any]
"""Points in a device's time around the forward pass, the backward pass and the engine's step of a micro-step."""


class OverflowedError(RuntimeError):
    """Every step overflowed, so no whole optimizer step could be timed."""


def run_trial(
    config: TrialConfig,
    *,
    seconds_per_sample: float | None,
    best_samples_per_second: float | None,
    workload: Workload,
    machine: Machine,
    model_config: transformers.PretrainedConfig,
    blocks: datasets.Dataset,
    plan: StepPlan,
    device: torch.device,
    meter: Meter,
    progress: Progress,
    engines: list[deepspeed.DeepSpeedEngine],
) -> dict[str, Any]:
    """Trains with one configuration and times it.

    Args:
        seconds_per_sample: the slowest that a trial of this study took so far, to know what hangs; None before any.
        best_samples_per_second: the study's best, to stop what is clearly slower; None to time to the end.
        engines: the engine is put here as soon as it exists, for the caller to release however the trial ends.

    Returns:
        This rank's result document; `objectives.running.deepspeed_objective.combine_ranks` reads it.
    """
    started = time.perf_counter()
    engine, parameters = build_engine(config, {}, workload, machine, model_config, device, progress, engines)
    rank = torch.distributed.get_rank()
    progress.enter("data")
    micro_batches = batches(blocks, config.micro_batch_size, rank=rank, ranks=machine.ranks, pin=device.type == "cuda")
    timer = StepTimer(engine, micro_batches, config.gradient_accumulation_steps, device, meter, progress)
    setup_seconds = time.perf_counter() - started

    flops = flops_per_sample(model_config, parameters, workload.seq_len)
    predicted = predicted_step_seconds(
        samples=config.micro_batch_size * config.gradient_accumulation_steps,
        seconds_per_sample=seconds_per_sample,
        flops_per_sample=flops,
        device=machine.device,
    )
    gas = config.gradient_accumulation_steps
    warmup_steps, warmup_micro_steps = plan.warmup(config.zero_stage, config.compile), min(gas, plan.warmup_micro_steps)
    progress.announce(
        "warm-up", seconds=warmup_deadline(predicted * warmup_micro_steps / gas, warmup_steps, config.compile)
    )
    warmup = timer.run(warmup_steps, micro_steps=warmup_micro_steps)
    best_step_seconds = (
        config.global_batch_size(machine.ranks) / best_samples_per_second if best_samples_per_second else None
    )
    timing = Timing(timer, gas, plan, best_step_seconds, device, progress)
    own = timing.short_steps(warmup[-1]) or timing.whole_steps(warmup[-1])
    seconds, optimizer_seconds = statistics.fmean(own.step_seconds), own.mean("optimizer_seconds")
    # What the warm-up would have taken at the pace of the steps that count.
    usual_seconds = len(own.early) * seconds
    usual_seconds += warmup_steps * (optimizer_seconds + warmup_micro_steps / gas * (seconds - optimizer_seconds))
    return {
        "step_seconds": own.step_seconds,
        "step_ci95_seconds": own.ci95,
        "from_parts": dataclasses.asdict(own.parts) if own.parts else None,
        "forward_seconds": own.mean("forward_seconds"),
        "backward_seconds": own.mean("backward_seconds"),
        "optimizer_seconds": optimizer_seconds,
        "warmup_step_seconds": [step.seconds for step in [*warmup, *own.early]],
        "first_steps_seconds": math.fsum(step.seconds for step in [*warmup, *own.early]) - usual_seconds,
        "stopped_early": own.stopped_early,
        "drifting": own.drifting,
        "skipped_steps": timer.skipped_steps,
        "deepspeed_samples_per_second": own.deepspeed_samples_per_second,
        "peak_memory_bytes": meter.peak_memory_bytes(),
        "reserved_memory_bytes": meter.reserved_memory_bytes(),
        "alloc_retries": meter.alloc_retries(),
        "setup_seconds": setup_seconds,
        "model_parameters": parameters,
        "flops_per_sample": flops,
    }


def build_engine(
    config: TrialConfig,
    knobs: Mapping[str, Any],
    workload: Workload,
    machine: Machine,
    model_config: transformers.PretrainedConfig,
    device: torch.device,
    progress: Progress,
    engines: list[deepspeed.DeepSpeedEngine],
) -> tuple[deepspeed.DeepSpeedEngine, int]:
    """The model of a configuration in its engine, and how many parameters it has.

    Args:
        knobs: of the model, laid over the configuration's own.
        engines: the engine is put here as soon as it exists.
    """
    progress.announce("config", seconds=BUILD_SECONDS["config"])
    ds_config = deepspeed_config(config, workload, ranks=machine.ranks, device=machine.device)
    deepspeed.DeepSpeedConfig(ds_config)  # a mistake is found here, before a model is built
    knobs = {**config.model_knobs, **knobs}
    for knob in {**config.knobs_on, **knobs}.items():
        if knob in KNOB_OPS:
            progress.announce("compile", seconds=COMPILE_SECONDS)
            load_knob_op(*knob, progress.notice)
    progress.announce("model", seconds=BUILD_SECONDS["model"])
    model = build_model(workload, configure_model(model_config, knobs), ds_config, device)
    apply_to_model(model, knobs)
    parameters = count_parameters(model)
    progress.announce("engine", seconds=BUILD_SECONDS["engine"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    engines.append(engine)
    apply_to_engine(engine, knobs)
    return engine, parameters


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimizer step took on this rank."""

    seconds: float
    """Of what was run: fewer micro-steps than a whole step has where it was closed early."""
    forward_seconds: float
    """Sum over the micro-steps of a whole step, of which some may not have been run; likewise below."""
    backward_seconds: float
    optimizer_seconds: float
    micro_step_seconds: tuple[float, ...] = ()
    """Of each micro-step, data loading included, but the one that closes the step."""

    @property
    def all_micro_step_seconds(self) -> list[float]:
        """Of each micro-step, the one that closes the step the last."""
        return [*self.micro_step_seconds, self.seconds - math.fsum(self.micro_step_seconds)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What the timed steps of a trial came to on this rank."""

    steps: Sequence[Step]
    step_seconds: Sequence[float]
    """Of whole steps, or the one estimate that `parts` make."""
    ci95: tuple[float, float]
    """Of the mean whole step, in seconds."""
    parts: StepParts | None = None
    early: Sequence[Step] = ()
    """Whole steps that were timed but not yet steady; `steps` doesn't have them."""
    stopped_early: bool
    drifting: bool
    deepspeed_samples_per_second: float | None = None

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(step, field) for step in self.steps)


class Timing:
    """Runs as many steps as the plan wants. All ranks decide on the same figures, and so alike."""

    def __init__(
        self,
        timer: "StepTimer",
        gradient_accumulation_steps: int,
        plan: StepPlan,
        best_step_seconds: float | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._timer = timer
        self._gradient_accumulation_steps = gradient_accumulation_steps
        self._plan = plan
        self._best_step_seconds = best_step_seconds
        self._device = device
        self._progress = progress

    def short_steps(self, last: Step) -> Timed | None:
        """Times steps that are closed early, and puts a whole one together.

        Args:
            last: the last step of the warm-up.

        Returns:
            None where whole steps are to be timed.
        """
        gas, plan, best = self._gradient_accumulation_steps, self._plan, self._best_step_seconds
        before = slowest(last.all_micro_step_seconds, self._device)
        steps: list[Step] = []
        agreed: list[list[float]] = []
        parts: StepParts | None = None
        while count := plan.short_step(
            gradient_accumulation_steps=gas, micro_step_seconds=min(before), parts=parts, best_step_seconds=best
        ):
            self._announce(math.fsum(before) * max(count / len(before), 1.0), 1)
            steps += self._timer.run(1, micro_steps=count)
            before = slowest(steps[-1].all_micro_step_seconds, self._device)
            agreed.append(before)
            parts = StepParts.of(agreed, gas)
        if parts is None or parts.step_seconds <= plan.long_step_seconds:
            return None
        own = StepParts.of([step.all_micro_step_seconds for step in steps], gas)
        own = dataclasses.replace(own, settling_micro_steps=parts.settling_micro_steps)
        return Timed(
            steps=steps,
            step_seconds=[own.step_seconds],
            ci95=own.ci95(),
            parts=own,
            stopped_early=plan.is_hopeless(parts, best),
            drifting=parts.is_drifting,
        )

    def whole_steps(self, last: Step) -> Timed:
        """Times whole steps.

        Args:
            last: the last step of the warm-up.
        """
        plan, best = self._plan, self._best_step_seconds
        [seconds] = slowest([last.seconds], self._device)
        seconds *= self._gradient_accumulation_steps / len(last.all_micro_step_seconds)
        deepspeed_timer = self._timer.deepspeed_timer()
        steps: list[Step] = []
        agreed: list[float] = []
        while count := plan.next_steps(agreed, best):
            self._announce(seconds, count)
            run = self._timer.run(count)
            steps += run
            agreed += slowest([step.seconds for step in run], self._device)
            seconds = agreed[-1]
        cut = warmup_length(agreed)
        step_seconds = [step.seconds for step in steps[cut:]]
        return Timed(
            steps=steps[cut:],
            step_seconds=step_seconds,
            ci95=self._whole_steps_ci95(steps[cut:]),
            early=steps[:cut],
            stopped_early=best is not None and is_hopeless(agreed, best),
            drifting=is_drifting(agreed[cut:]),
            deepspeed_samples_per_second=deepspeed_timer.samples_per_second(),
        )

    def _whole_steps_ci95(self, steps: Sequence[Step]) -> tuple[float, float]:
        """The interval of the mean step; of a single one by its micro-steps, where it has enough of them."""
        if len(steps) == 1 and self._gradient_accumulation_steps >= FEWEST_MICRO_STEPS:
            return StepParts.of([steps[0].all_micro_step_seconds], self._gradient_accumulation_steps).ci95()
        return step_ci95([step.seconds for step in steps])

    def _announce(self, step_seconds: float, steps: int) -> None:
        self._progress.announce("timed steps", seconds=timed_deadline(step_seconds, steps))


class StepTimer:
    """Runs optimizer steps back to back, as training does, and reads their times afterwards."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        micro_batches: Iterator[dict[str, torch.Tensor]],
        gradient_accumulation_steps: int,
        device: torch.device,
        meter: Meter,
        progress: Progress,
    ) -> None:
        self._engine = engine
        self._micro_batches = micro_batches
        self._gradient_accumulation_steps = gradient_accumulation_steps
        self._device = device
        self._meter = meter
        self._progress = progress
        self.skipped_steps = 0

    def deepspeed_timer(self) -> "DeepSpeedTimer":
        """DeepSpeed's own timer of the steps from now on."""
        return DeepSpeedTimer(self._engine)

    def run(self, steps: int, *, micro_steps: int | None = None) -> list[Step]:
        """Runs until `steps` optimizer steps were not skipped, and returns their times.

        A step that fp16 overflow skipped has no optimizer in it; it is run, counted in `skipped_steps` and left out.

        Args:
            micro_steps: of each step; None for all that a step of this configuration has.

        Raises:
            OverflowedError: the loss scale never settled.
        """
        meter = self._meter
        meter.synchronize()
        torch.distributed.barrier()
        boundaries = [meter.mark()]
        marks: list[list[Marks]] = []
        whole: list[bool] = []
        while whole.count(True) < steps:
            skipped_before = self._engine.skipped_steps
            marks.append([])
            for left in reversed(range(micro_steps or self._gradient_accumulation_steps)):
                self._engine.set_gradient_accumulation_boundary(left == 0)
                marks[-1].append(self._micro_step())
            boundaries.append(meter.mark())
            whole.append(self._engine.skipped_steps == skipped_before)
            self.skipped_steps += not whole[-1]
            if self.skipped_steps > MAX_SKIPPED_STEPS:
                raise OverflowedError(f"{MAX_SKIPPED_STEPS} steps overflowed in fp16; try bf16 or a lower loss scale")
        meter.synchronize()
        return self._steps(boundaries, marks, whole)

    def _steps(self, boundaries: list[Any], marks: list[list[Marks]], whole: list[bool]) -> list[Step]:
        return [
            Step(
                seconds=self._meter.seconds(boundaries[step], boundaries[step + 1]),
                forward_seconds=self._part_seconds(marks[step], 0),
                backward_seconds=self._part_seconds(marks[step], 1),
                optimizer_seconds=self._part_seconds(marks[step], 2),
                micro_step_seconds=self._micro_step_seconds(boundaries[step], marks[step]),
            )
            for step, is_whole in enumerate(whole)
            if is_whole
        ]

    def _micro_step_seconds(self, start: Any, micro_steps: Sequence[Marks]) -> tuple[float, ...]:
        """Of those that don't close the step, each from the end of the one before it."""
        ends = [start, *(marks[-1] for marks in micro_steps[:-1])]
        return tuple(self._meter.seconds(one, other) for one, other in itertools.pairwise(ends))

    def _part_seconds(self, micro_steps: Sequence[Marks], part: int) -> float:
        """Of a whole step's forward passes (0), backward passes (1) or engine steps (2)."""
        seconds = [self._meter.seconds(marks[part], marks[part + 1]) for marks in micro_steps]
        if len(seconds) == self._gradient_accumulation_steps or len(seconds) < FEWEST_MICRO_STEPS:
            return math.fsum(seconds)
        return whole_step(seconds[0] + seconds[-1], seconds[1:-1], self._gradient_accumulation_steps)

    def _micro_step(self) -> Marks:
        """One forward, backward and engine step; the marks around them."""
        progress, meter = self._progress, self._meter
        progress.enter("data")
        batch = {key: tensor.to(self._device, non_blocking=True) for key, tensor in next(self._micro_batches).items()}
        before = meter.mark()
        progress.enter("forward")
        loss = self._engine(**batch).loss
        after_forward = meter.mark()
        progress.enter("backward")
        self._engine.backward(loss)
        after_backward = meter.mark()
        progress.enter("step")
        self._engine.step()
        return before, after_forward, after_backward, meter.mark()


class DeepSpeedTimer:
    """What DeepSpeed's own ThroughputTimer says of the steps from now on."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._timer = engine.tput_timer
        # Its first steps are not in its seconds, and those of a warm-up may have fewer samples than it thinks.
        self._steps_before = max(self._timer.global_step_count, self._timer.start_step)
        self._seconds_before = self._timer.total_elapsed_time

    def samples_per_second(self) -> float | None:
        """None where it has timed no step yet, or the user has switched it off."""
        steps = self._timer.global_step_count - self._steps_before
        seconds = self._timer.total_elapsed_time - self._seconds_before
        return float(self._timer.batch_size * steps / seconds) if steps > 0 and seconds > 0 else None
