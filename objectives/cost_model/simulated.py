"""The objective that trains nothing: the cost model answers, with the errors and the noise of a real machine.

What it says is predicted, not measured. So that a search cannot simply read the optimum off the same formulas, each
simulated machine deviates from them by hidden amounts, drawn once from its seed: as a whole, by ZeRO stage, and a
little by configuration.
"""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.objective import OnPhase
from ds_tune.objectives.timing.intervals import step_ci95, throughput
from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.timing.step_plan import StepPlan, is_hopeless
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, Provenance, TrialConfig

# Standard deviations of the logarithm of what the machine does over what the formulas say.
MACHINE_DEVIATION = 0.10
STAGE_DEVIATION = 0.05
CONFIG_DEVIATION = 0.02
MEMORY_DEVIATION = 0.02
CONFIG_MEMORY_DEVIATION = 0.005
STEP_NOISE = 0.015

LOST_SHARES = (0.1, 1.2)
"""Of its large tensors, what a configuration loses to fragments: somewhere in this range, as on the H100 that
`objectives.cost_model.memory_calibration` speaks of."""

SETUP_SECONDS = 0.6


class SimulatedObjective:
    """See `Objective`."""

    provenance = Provenance.SIMULATED

    def __init__(self, model: CostModel, machine: Machine, seed: int, plan: StepPlan | None = None) -> None:
        self._model = model
        self._machine = machine
        self._seed = seed
        self._plan = plan or StepPlan()

    def prepare(self, configs: Iterable[TrialConfig] = ()) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing was started."""

    def run(
        self,
        config: TrialConfig,
        folder: Path,
        on_phase: OnPhase,
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        prediction = self._model.predict(config)
        machine, stage, own = self._random("machine"), self._random(config.zero_stage), self._random(config.name)
        peak = prediction.memory.peak_bytes
        peak *= math.exp(MEMORY_DEVIATION * machine.standard_normal() + CONFIG_MEMORY_DEVIATION * own.standard_normal())
        for_tensors = self._machine.capacity_bytes - self._model.hardware.outside_bytes
        usable = for_tensors - own.uniform(*LOST_SHARES) * prediction.memory.large_bytes
        if peak > usable:
            return Failure(
                kind=FailureKind.OUT_OF_MEMORY,
                message=f"{peak / GIB:.1f} GiB simulated, {usable / GIB:.1f} GiB usable",
                phase="backward" if prediction.memory.backward_bytes > prediction.memory.step_bytes else "step",
                peak_memory_bytes=int(usable),
                wall_seconds=2 * SETUP_SECONDS,
            )
        slower = math.exp(
            MACHINE_DEVIATION * machine.standard_normal()
            + STAGE_DEVIATION * stage.standard_normal()
            + CONFIG_DEVIATION * own.standard_normal()
        )
        step = prediction.step
        samples = config.global_batch_size(self._machine.ranks)
        best = samples / best_samples_per_second if best_samples_per_second else None
        accumulation = config.gradient_accumulation_steps
        optimizer = step.optimizer * slower

        def run_step(micro_steps: int) -> list[float]:
            """Seconds of each micro-step: with the step's own noise and its own."""
            usual = step.seconds * slower * math.exp(STEP_NOISE * own.standard_normal())
            seconds = np.exp(STEP_NOISE * own.standard_normal(micro_steps)) * (usual - optimizer) / accumulation
            seconds[-1] += optimizer
            return [float(each) for each in seconds]

        run: list[list[float]] = []
        parts: StepParts | None = None
        while count := self._plan.short_step(
            gradient_accumulation_steps=accumulation,
            micro_step_seconds=(step.seconds * slower - optimizer) / accumulation,
            parts=parts,
            best_step_seconds=best,
        ):
            run.append(run_step(count))
            parts = StepParts.of(run, accumulation)
        if parts is not None:
            steps, interval_seconds = [parts.step_seconds], parts.ci95()
            stopped_early = self._plan.is_hopeless(parts, best)
        else:
            steps = []
            while count := self._plan.next_steps(steps, best):
                run += [run_step(accumulation) for _ in range(count)]
                steps = [math.fsum(each) for each in run]
            interval_seconds = step_ci95(steps)
            stopped_early = best is not None and is_hopeless(steps, best)
        rate, interval = throughput(steps, samples, interval_seconds)
        share = min(self._plan.warmup_micro_steps / accumulation, 1.0)
        warmup = (share * step.seconds * slower * 1.2,) * self._plan.warmup(config.zero_stage, config.compile)
        compute = (step.seconds - step.optimizer) * slower
        return Measurement(
            step_seconds=tuple(steps),
            samples_per_second=rate,
            samples_per_second_ci95=interval,
            forward_seconds=compute / 3,
            backward_seconds=compute * 2 / 3,
            optimizer_seconds=optimizer,
            deepspeed_samples_per_second=None,
            warmup_step_seconds=warmup,
            skipped_steps=0,
            stopped_early=stopped_early,
            from_parts=parts,
            peak_memory_bytes=int(peak),
            reserved_memory_bytes=int(min(peak * 1.06, for_tensors)),
            alloc_retries=0,
            setup_seconds=SETUP_SECONDS,
            wall_seconds=SETUP_SECONDS + math.fsum(warmup) + math.fsum(map(math.fsum, run)),
            model_parameters=self._model.architecture.parameters,
            flops_per_sample=self._model.architecture.flops_per_sample(self._model.seq_len),
        )

    def _random(self, what: object) -> np.random.Generator:
        """The same numbers for the same thing on the same simulated machine, in whatever order trials come."""
        digest = hashlib.sha256(f"{self._seed} {self._model.hardware.name} {what}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))
