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

from objectives.deadlines import BUILD_SECONDS, predicted_step_seconds, timed_deadline, warmup_deadline
from objectives.ds_config import deepspeed_config
from objectives.machine import Machine
from objectives.rank.data import batches
from objectives.rank.device import Meter
from objectives.rank.distributed import slowest
from objectives.rank.knobs import apply_to_engine, apply_to_model, configure_model
from objectives.rank.model import build_model, count_parameters, flops_per_sample
from objectives.rank.ops import COMPILE_SECONDS, KNOB_OPS, load_knob_op
from objectives.rank.progress import Progress
from objectives.timing.intervals import is_drifting, step_ci95, warmup_length
from objectives.timing.step_plan import MidStepRule, StepPlan, is_hopeless, later_half
from objectives.trial import TrialConfig
from objectives.workload import Workload

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
        This rank's result document; `objectives.deepspeed_objective.combine_ranks` reads it.
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
    warmup_steps = plan.warmup(config.zero_stage, config.compile)
    best_step_seconds = (
        config.global_batch_size(machine.ranks) / best_samples_per_second if best_samples_per_second else None
    )
    mid_step_rule = plan.mid_step_rule(
        zero_stage=config.zero_stage,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        best_step_seconds=best_step_seconds,
    )
    gas = config.gradient_accumulation_steps
    warmup_micro_steps = min(gas, plan.warmup_micro_steps)
    progress.announce(
        "warm-up", seconds=warmup_deadline(predicted * warmup_micro_steps / gas, warmup_steps, config.compile)
    )
    warmup = timer.run(warmup_steps, micro_steps=warmup_micro_steps)
    agreed = [seconds * gas / warmup_micro_steps for seconds in slowest([step.seconds for step in warmup], device)]
    deepspeed_timer = DeepSpeedTimer(engine)
    timed: list[Step] = []
    timed_seconds: list[float] = []  # the same on every rank, so that all decide alike; as are the next
    micro_step_seconds: list[float] = []
    given_up = False
    while not given_up and (count := plan.next_steps(timed_seconds, best_step_seconds, micro_step_seconds)):
        progress.announce("timed steps", seconds=timed_deadline(agreed[-1], count))
        steps = timer.run(count, mid_step_rule=None if timed else mid_step_rule)
        agreed = slowest([step.seconds for step in steps], device)
        timed += steps
        timed_seconds += agreed
        micro_step_seconds += slowest([seconds for step in steps for seconds in step.micro_step_seconds], device)
        given_up = steps[-1].from_micro_steps > 0
    cut = warmup_length(timed_seconds)
    early, timed = timed[:cut], timed[cut:]
    own_micro_steps = [seconds for step in timed for seconds in step.micro_step_seconds]
    seconds, optimizer_seconds = (
        statistics.fmean(getattr(step, field) for step in timed) for field in ("seconds", "optimizer_seconds")
    )
    # What the warm-up would have taken at the pace of the steps that count.
    usual_seconds = cut * seconds
    usual_seconds += warmup_steps * (optimizer_seconds + warmup_micro_steps / gas * (seconds - optimizer_seconds))
    return {
        "step_seconds": [step.seconds for step in timed],
        "step_ci95_seconds": step_ci95([step.seconds for step in timed], own_micro_steps),
        "forward_seconds": statistics.fmean(step.forward_seconds for step in timed),
        "backward_seconds": statistics.fmean(step.backward_seconds for step in timed),
        "optimizer_seconds": optimizer_seconds,
        "warmup_step_seconds": [step.seconds for step in [*warmup, *early]],
        "first_steps_seconds": math.fsum(step.seconds for step in [*warmup, *early]) - usual_seconds,
        "stopped_early": given_up or (best_step_seconds is not None and is_hopeless(timed_seconds, best_step_seconds)),
        "from_micro_steps": timed[0].from_micro_steps,
        "drifting": is_drifting(timed_seconds[cut:]),
        "skipped_steps": timer.skipped_steps,
        "deepspeed_samples_per_second": deepspeed_timer.samples_per_second(),
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
    """What one whole optimizer step took on this rank: all of it, and the sums over its micro-steps."""

    seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    micro_step_seconds: tuple[float, ...] = ()
    """Of each micro-step, data loading included, but the one that closes the step."""
    from_micro_steps: int = 0
    """Above zero: no step that ran whole, but an estimate from so many micro-steps."""


class StepTimer:
    """Runs whole optimizer steps back to back, as training does, and reads their times afterwards."""

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

    def run(
        self, steps: int, *, micro_steps: int | None = None, mid_step_rule: MidStepRule | None = None
    ) -> list[Step]:
        """Runs until `steps` optimizer steps were not skipped, and returns their times.

        A step that fp16 overflow skipped has no optimizer in it; it is run, counted in `skipped_steps` and left out.

        Args:
            micro_steps: of each step; None for all that a step of this configuration has.
            mid_step_rule: asked now and then between micro-steps, at the cost of a synchronization. When it finds the
                configuration hopeless, this ends there, on all ranks, and the last step returned is an estimate.

        Raises:
            OverflowedError: the loss scale never settled.
        """
        meter = self._meter
        meter.synchronize()
        torch.distributed.barrier()
        boundaries = [meter.mark()]
        marks: list[list[Marks]] = []
        not_closing: list[Marks] = []
        whole: list[bool] = []
        while whole.count(True) < steps:
            skipped_before = self._engine.skipped_steps
            marks.append([])
            for left in reversed(range(micro_steps or self._gradient_accumulation_steps)):
                self._engine.set_gradient_accumulation_boundary(left == 0)
                marks[-1].append(self._micro_step())
                if mid_step_rule is not None and left:
                    not_closing.append(marks[-1][-1])
                    if estimate := self._estimate_if_hopeless(not_closing, mid_step_rule):
                        return [*self._whole_steps(boundaries, marks, whole), estimate]
            boundaries.append(meter.mark())
            whole.append(self._engine.skipped_steps == skipped_before)
            self.skipped_steps += not whole[-1]
            if self.skipped_steps > MAX_SKIPPED_STEPS:
                raise OverflowedError(f"{MAX_SKIPPED_STEPS} steps overflowed in fp16; try bf16 or a lower loss scale")
        meter.synchronize()
        return self._whole_steps(boundaries, marks, whole)

    def _whole_steps(self, boundaries: list[Any], marks: list[list[Marks]], whole: list[bool]) -> list[Step]:
        return [
            Step(
                seconds=self._meter.seconds(boundaries[step], boundaries[step + 1]),
                forward_seconds=math.fsum(self._part_seconds(marks[step], 0)),
                backward_seconds=math.fsum(self._part_seconds(marks[step], 1)),
                optimizer_seconds=math.fsum(self._part_seconds(marks[step], 2)),
                micro_step_seconds=self._micro_step_seconds(boundaries[step], marks[step]),
            )
            for step, is_whole in enumerate(whole)
            if is_whole
        ]

    def _micro_step_seconds(self, start: Any, micro_steps: Sequence[Marks]) -> tuple[float, ...]:
        """Of those that don't close the step, each from the end of the one before it."""
        ends = [start, *(marks[-1] for marks in micro_steps[:-1])]
        return tuple(self._meter.seconds(one, other) for one, other in itertools.pairwise(ends))

    def _estimate_if_hopeless(self, micro_steps: list[Marks], rule: MidStepRule) -> Step | None:
        """What a whole step would take on this rank, if the ranks agree that it is hopelessly long."""
        if not rule.is_due(len(micro_steps)):
            return None
        self._meter.synchronize()
        seconds = [self._meter.seconds(marks[0], marks[-1]) for marks in micro_steps]
        if not rule.is_hopeless(slowest(seconds, self._device)):
            return None
        used = later_half(micro_steps)
        return Step(
            seconds=rule.step_seconds(seconds),
            forward_seconds=self._gradient_accumulation_steps * statistics.fmean(self._part_seconds(used, 0)),
            backward_seconds=self._gradient_accumulation_steps * statistics.fmean(self._part_seconds(used, 1)),
            optimizer_seconds=0.0,  # not reached
            from_micro_steps=len(used),
        )

    def _part_seconds(self, micro_steps: Sequence[Marks], part: int) -> list[float]:
        """Of each micro-step's forward (0), backward (1) or engine step (2)."""
        return [self._meter.seconds(marks[part], marks[part + 1]) for marks in micro_steps]

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
