"""Predicted rates corrected by measurements: what is left of the errors is a Gaussian process over the configurations.

log(measured / predicted) is a sum of a common factor, one for each ZeRO stage and each knob, and smooth functions of
the batch sizes. How wrong the formulas are is not known beforehand: several priors of it are kept side by side, each
weighed by how well it explains the measurements (Bayesian model averaging).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ds_tune.objectives.cost_model.gaussian_process import (
    Kernel,
    Posterior,
    Rows,
    condition,
    outer,
    same,
    smooth,
)
from ds_tune.objectives.cost_model.grid import Floats, Grid
from ds_tune.objectives.cost_model.prior import ERROR_PRIORS, ErrorPrior
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome

TRIAL_NOISE = 0.01
"""Relative standard deviation of one trial's rate that its own steps don't show, in ranks that stay warm. Runs in fresh
processes differ by half of it (`storage.finalists`); with that, 95% intervals would hold 0.4% less."""

OWN_LAUNCH_SPREAD = 0.15
"""Relative standard deviation of a run's launch seconds that says nothing about others: how fast a host launches
differs from minute to minute. Without it 72 to 93% of what nine trials left open was inside its 95% interval, on six
recorded surfaces; with it 89 to 98%."""

STAGES_IN_COMMON = 0.5
"""Share of the errors that ZeRO-0, 1 and 2 have in common: they compute the same, and differ in the reduction of
gradients and in the optimizer step. ZeRO-3 gathers parameters around every module."""
STAGES_IN_COMMON_ON_ONE = 0.9
"""Share on one rank, with nothing to reduce or partition: they differ in copies of gradients."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Lesson of one trial, by its row in the grid."""

    row: int
    log_rate: float | None = None
    """None where nothing was timed."""
    relative_error: float = 0.0
    """Standard deviation of the mean rate, as far as the trial's own steps show it."""
    peak_bytes: float | None = None
    ran_out: bool = False
    """It ran out of memory: its peak would have been above the capacity."""
    from_this_study: bool = True
    """True for a trial of the study that asks: only its own can be its best, an earlier study's cannot."""


TIGHT = 0.95
"""From this fraction of its capacity on, an allocator that searches for room slows a run by up to a fifth."""
TIGHT_ERROR = 0.2


def observation_of(row: int, outcome: Outcome, capacity_bytes: float) -> Observation | None:
    """Lesson of an outcome about its configuration; None for a crash or a timeout, which teach nothing.

    A rate from a run that was tight on memory is the configuration's own, but says little about others.
    """
    if isinstance(outcome, Failure):
        return Observation(row=row, ran_out=True) if outcome.kind is FailureKind.OUT_OF_MEMORY else None
    assert isinstance(outcome, Measurement)
    low, high = outcome.samples_per_second_ci95
    error = min((high - low) / 2 / 1.96 / outcome.samples_per_second, 0.2)
    if outcome.peak_memory_bytes > TIGHT * capacity_bytes:
        error = max(error, TIGHT_ERROR)
    return Observation(
        row=row,
        log_rate=math.log(outcome.samples_per_second),
        relative_error=error,
        # A trial that ended inside its first step never held what the optimizer step needs.
        peak_bytes=None if outcome.from_micro_steps else float(outcome.peak_memory_bytes),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class RatePosterior:
    """Predicted rates under each `ErrorPrior`; all arrays have a column for each configuration of the grid."""

    weights: Floats
    means: Floats
    """Natural logarithms of samples/s: (priors, configurations), likewise below."""
    deviations: Floats
    posteriors: tuple[Posterior, ...]
    """Posteriors of the errors, for each prior."""

    @property
    def mean(self) -> Floats:
        return np.asarray(self.weights @ self.means)

    @property
    def deviation(self) -> Floats:
        second = self.weights @ (self.deviations**2 + self.means**2)
        return np.sqrt(np.maximum(second - self.mean**2, 0.0))

    def draws(self, rows: Rows, count: int, random: np.random.Generator) -> Floats:
        """Rates of these rows as they may be, together: what they have in common is drawn once for all.

        Returns:
            Natural logarithms of samples/s, (about `count`, rows); of each prior as many as it weighs.
        """
        drawn = []
        for weight, mean, process in zip(self.weights, self.means, self.posteriors, strict=True):
            share = round(float(weight) * count)
            # What the rows have all in common makes it singular; that much of their own is far below any noise.
            root = np.linalg.cholesky(process.covariance(rows) + 1e-8 * np.eye(len(rows)))
            drawn.append(mean[rows] + random.standard_normal((share, len(rows))) @ root.T)
        return np.concatenate(drawn)


def calibrate_rates(
    grid: Grid, observations: Sequence[Observation], priors: Sequence[ErrorPrior] = ERROR_PRIORS
) -> RatePosterior:
    """Predicted rates of the whole grid, given what was measured of some of it.

    Args:
        priors: answers to how far the predictions may be off.
    """
    timed = [each for each in observations if each.log_rate is not None]
    rows = np.array([each.row for each in timed], dtype=int)
    measured = np.array([each.log_rate for each in timed], dtype=float)
    noise = np.array([TRIAL_NOISE**2 + each.relative_error**2 for each in timed])
    evidences, means, posteriors = [], [], []
    for prior in priors:
        # Without the formulas, what rates are about is not known but for the measurements' own level.
        level = float(np.mean(measured)) if len(rows) else float(np.mean(grid.log_rate))
        start = grid.log_rate if prior.slope else np.full(len(grid), level)
        process = condition(_rate_kernel(grid, prior), rows, measured - start[rows], noise)
        means.append(start + process.mean)
        posteriors.append(process)
        # Before anything is measured, an answer that starts from nothing has nothing to say.
        speaks = prior.slope or len(rows) or len(priors) == 1
        evidences.append(math.log(prior.prior_weight) + process.log_evidence if speaks else -math.inf)
    relative = np.exp(np.array(evidences) - max(evidences))
    deviations = np.sqrt([process.variances for process in posteriors])
    return RatePosterior(relative / relative.sum(), np.array(means), deviations, tuple(posteriors))


def _rate_kernel(grid: Grid, prior: ErrorPrior) -> Kernel:
    def between(one: Rows, other: Rows) -> Floats:
        stage = _alike_stages(grid, one, other)
        knobs = same(grid.knobs, one, other)
        micro = smooth(grid.log2_micro_batch, one, other, length=2.0)
        accumulation = smooth(grid.log2_accumulation, one, other, length=2.0)
        joint = smooth(grid.log2_micro_batch, one, other, length=1.0)
        joint = joint * smooth(grid.log2_accumulation, one, other, length=1.0)
        return np.asarray(
            prior.common**2
            + prior.stage**2 * stage
            + prior.knobs**2 * knobs
            + prior.launch**2 * outer(grid.launch_share, one, other) * (0.5 + 0.25 * stage + 0.25 * knobs)
            + prior.parts**2 * outer(grid.communication_share, one, other) * (0.5 + 0.5 * stage)
            + prior.parts**2 * outer(grid.optimizer_share, one, other) * (0.5 + 0.5 * stage)
            # A stage or a knob that is off is off more where launches or communication dominate: small batches.
            + prior.micro_batch**2 * micro * (0.5 + 0.3 * stage + 0.2 * knobs)
            + prior.accumulation**2 * accumulation * (0.5 + 0.5 * stage)
            + prior.interaction**2 * joint * stage * knobs
            + OWN_LAUNCH_SPREAD**2 * outer(grid.launch_share, one, other) * np.equal.outer(one, other)  # its own
        )

    everywhere = (prior.common, prior.stage, prior.knobs, prior.micro_batch, prior.accumulation, prior.interaction)
    shares = (prior.launch**2 + OWN_LAUNCH_SPREAD**2) * grid.launch_share**2
    shares += prior.parts**2 * (grid.communication_share**2 + grid.optimizer_share**2)
    return Kernel(between, math.fsum(part**2 for part in everywhere) + shares)


def _alike_stages(grid: Grid, one: Rows, other: Rows) -> Floats:
    whole = grid.stage < 3
    in_common = STAGES_IN_COMMON_ON_ONE if grid.ranks == 1 else STAGES_IN_COMMON
    return np.maximum(same(grid.stage, one, other), in_common * np.logical_and.outer(whole[one], whole[other]))
