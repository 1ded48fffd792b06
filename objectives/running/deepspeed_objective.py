"""The objective that really trains: each configuration runs in ranks of its own and is timed there."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ds_tune.objectives.errors import EnvironmentFault
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.numerics import STEPS, LossCurve
from ds_tune.objectives.objective import OnPhase
from ds_tune.objectives.running.launcher import Launcher
from ds_tune.objectives.running.protocol import DEEPSPEED, Learn, Losses, RankContext, RankResult, Time
from ds_tune.objectives.running.rank_group import RankGroup, ignore
from ds_tune.objectives.timing.intervals import throughput
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Failure, Measurement, Outcome, Provenance, TrialConfig
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.objectives.workload.script_facts import ScriptFacts

Result = TypeVar("Result", list[RankResult], list[LossCurve], list[ScriptFacts])


class DeepSpeedObjective:
    """See `Objective`. Ranks live on from trial to trial, unless one leaves them unusable or fresh ones are wanted."""

    provenance = Provenance.MEASURED

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        *,
        launcher: Launcher,
        log_folder: Path,
        trial_seconds: float,
        plan: StepPlan | None = None,
        fresh_ranks: bool = False,
        trainer: str = DEEPSPEED,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            log_folder: where the ranks' output goes until a trial has its own folder.
            trial_seconds: a trial that has not ended by then is killed, its process start not counted.
            fresh_ranks: give every trial processes of its own.
            trainer: see `RankContext`.
            notice: told in one line when ranks have to be replaced, and why.
        """
        self._machine = machine
        self._launcher = launcher
        self._log_folder = log_folder
        self._trial_seconds = trial_seconds
        self._context = RankContext(workload=workload, machine=machine, trainer=trainer)
        self.plan = plan or StepPlan()
        """How long a trial is timed; another one may be set between trials."""
        self._fresh_ranks = fresh_ranks
        self._notice = notice
        self._group: RankGroup | None = None
        self._start_seconds = 0.0
        self._seconds_per_sample: float | None = None  # of a rank: the slowest so far

    def prepare(self, configs: Iterable[TrialConfig] = ()) -> None:
        # Optimizers are compiled before the first trial: the first configuration's, and where possible all others.
        of_each = {(config.optimizer, config.offload_optimizer): config for config in configs}
        self._context = dataclasses.replace(self._context, optimizers=tuple(of_each.values()))
        failure = self._start()
        if failure is not None:
            raise EnvironmentFault(f"the training processes do not start: {failure.message}\n{failure.log_tail}")

    def run(
        self,
        config: TrialConfig,
        folder: Path,
        on_phase: OnPhase,
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        started = time.monotonic()
        command = Time(
            config=config,
            log_folder=folder.resolve(),
            plan=self.plan,
            seconds_per_sample=self._seconds_per_sample,
            best_samples_per_second=best_samples_per_second,
        )
        answer = self._with_group(
            config.name, on_phase, lambda group: group.run(command, seconds=self._trial_seconds, on_phase=on_phase)
        )
        start_seconds, self._start_seconds = self._start_seconds, 0.0
        wall_seconds = time.monotonic() - started
        if isinstance(answer, Failure):
            return dataclasses.replace(answer, wall_seconds=wall_seconds)
        measured = combine_ranks(answer, config=config, start_seconds=start_seconds, wall_seconds=wall_seconds)
        seconds_per_sample = self._machine.ranks / measured.samples_per_second
        self._seconds_per_sample = max(seconds_per_sample, self._seconds_per_sample or 0.0)
        return measured

    def losses(self, config: TrialConfig, folder: Path, on_phase: OnPhase) -> LossCurve | Failure:
        """The losses of a configuration's first steps; see `objectives.numerics`."""
        command = Losses(
            config=config, log_folder=folder.resolve(), steps=STEPS, seconds_per_sample=self._seconds_per_sample
        )
        answer = self._with_group(
            config.name, on_phase, lambda group: group.run(command, seconds=self._trial_seconds, on_phase=on_phase)
        )
        return answer if isinstance(answer, Failure) else answer[0]

    def learn(self, folder: Path, on_phase: OnPhase = ignore) -> ScriptFacts | Failure:
        """What a person's script trains, from a few steps of it as it stands."""
        command = Learn(log_folder=folder.resolve())
        answer = self._with_group(
            "the first run",
            on_phase,
            lambda group: group.run(command, seconds=self._trial_seconds, on_phase=on_phase),
        )
        return answer if isinstance(answer, Failure) else answer[0]

    def _with_group(
        self, name: str, on_phase: OnPhase, run: Callable[[RankGroup], Result | Failure]
    ) -> Result | Failure:
        """Has the ranks run a configuration, starts them where there are none, and ends those it left unusable."""
        if self._group is None:
            on_phase("start")
            failure = self._start()
            if failure is not None:
                return failure
        assert self._group is not None
        try:
            answer = run(self._group)
            reason = None if self._fresh_ranks else self._group.reason_to_replace()
        except BaseException:
            self.close()
            raise
        if self._fresh_ranks or reason is not None:
            self.close()
        if reason is not None:
            self._notice(f"New training processes after {name}: {reason}.")
        return answer

    @property
    def left_bytes(self) -> Mapping[str, int] | None:
        """Memory that the last trial left on any rank (see `RankGroup.left_bytes`); None while no ranks are alive."""
        return self._group.left_bytes if self._group is not None else None

    def close(self) -> None:
        if self._group is not None:
            self._group.kill()
            self._group = None

    def _start(self) -> Failure | None:
        started = time.monotonic()
        self._log_folder.mkdir(parents=True, exist_ok=True)
        stdout, stderr = self._log_folder / "start.stdout.log", self._log_folder / "start.stderr.log"
        for log in (stdout, stderr):
            log.write_bytes(b"")
        self._group = RankGroup(self._launcher, stdout=stdout, stderr=stderr, notice=self._notice)
        try:
            failure = self._group.setup(self._context)
        except BaseException:
            self.close()
            raise
        self._start_seconds = time.monotonic() - started
        if failure is not None:
            self.close()
        return failure


def combine_ranks(
    ranks: Sequence[RankResult], *, config: TrialConfig, start_seconds: float, wall_seconds: float
) -> Measurement:
    """One measurement from the results of all ranks.

    Times are the slowest rank's, by its total (taking the slowest of each single step would add up the jitter
    of different ranks); memory figures are the highest of any rank.
    """
    slowest = max(ranks, key=lambda result: math.fsum(result.step_seconds))
    samples = config.global_batch_size(len(ranks))
    rate, interval = throughput(slowest.step_seconds, samples, slowest.step_ci95_seconds)
    tokens = slowest.tokens_per_sample
    return Measurement(
        step_seconds=slowest.step_seconds,
        samples_per_second=rate,
        samples_per_second_ci95=interval,
        tokens_per_second=None if tokens is None else rate * tokens,
        forward_seconds=slowest.forward_seconds,
        backward_seconds=slowest.backward_seconds,
        optimizer_seconds=slowest.optimizer_seconds,
        deepspeed_samples_per_second=ranks[0].deepspeed_samples_per_second,
        warmup_step_seconds=slowest.warmup_step_seconds,
        first_steps_seconds=slowest.first_steps_seconds,
        skipped_steps=slowest.skipped_steps,
        stopped_early=slowest.stopped_early,
        from_parts=slowest.from_parts,
        drifting=slowest.drifting,
        peak_memory_bytes=max(result.peak_memory_bytes for result in ranks),
        reserved_memory_bytes=max(result.reserved_memory_bytes for result in ranks),
        alloc_retries=max(result.alloc_retries for result in ranks),
        setup_seconds=start_seconds + max(result.setup_seconds for result in ranks),
        wall_seconds=wall_seconds,
        model_parameters=ranks[0].model_parameters,
        flops_per_sample=ranks[0].flops_per_sample,
    )
