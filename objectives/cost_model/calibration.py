"""The cost model corrected by measurements: what is left of its errors is a Gaussian process over the configurations.

Speed: log(measured / predicted) is a sum of a common factor, one for each ZeRO stage and each knob, and smooth
functions of the batch sizes. How far the formulas are to be trusted is not known beforehand: several answers are kept
side by side, each weighed by how well it explains the measurements (Bayesian model averaging).

Memory: the predicted parts (states, activations) each carry a factor, so that two measurements tell the slope of every
micro-batch size. A run out of memory says only that the peak is above the capacity: it enters as the Gaussian with the
moments of the truncated one (assumed-density filtering, Minka 2001).
"""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from objectives.cost_model.gaussian_process import (
    Kernel,
    Process,
    Rows,
    condition,
    normal_cdf,
    outer,
    posterior_at,
    same,
    smooth,
)
from objectives.cost_model.model import Floats, Grid
from objectives.trial import Failure, FailureKind, Measurement, Outcome

RUN_NOISE = 0.01
"""Relative standard deviation of one run's rate that its own steps don't show."""

MEMORY_NOISE = 0.008
"""Relative standard deviation of a measured peak about a smooth function: the allocator's fragmentation."""

FRAGMENTATION = 0.02
"""Of its capacity, an allocator in distress cannot use so much; blocks that fit nowhere."""
FRAGMENTATION_SPREAD = 0.012
"""How far that may be off on a machine with a model: the same for all of a study, so that it is learned."""
OWN_FRAGMENTATION_SPREAD = 0.009
"""How far a single configuration differs from that: of two with the same peak one may fit."""

STAGES_IN_COMMON = 0.5
"""Of how far the rates of ZeRO-0, 1 and 2 are off: they compute the same, and differ in the reduction of gradients and
in the optimizer step. ZeRO-3 gathers parameters around every module."""
STAGES_IN_COMMON_ON_ONE = 0.9
"""The same where there is one rank, with nothing to reduce or partition: they differ in copies of gradients."""

_NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one trial taught, by its row in the grid."""

    row: int
    log_rate: float | None = None
    """None where nothing was timed."""
    relative_error: float = 0.0
    """Standard deviation of the mean rate, as far as the trial's own steps show it."""
    peak_bytes: float | None = None
    ran_out: bool = False
    """It ran out of memory: its peak would have been above the capacity."""
    is_own: bool = True
    """Of the study that asks, not of an earlier one: only its own trials can be its best."""


TIGHT = 0.95
"""From this fraction of its capacity on, an allocator that searches for room slows a run by up to a fifth."""
TIGHT_ERROR = 0.2


def observation_of(row: int, outcome: Outcome, capacity_bytes: float) -> Observation | None:
    """What an outcome says about its configuration; None for a crash or a timeout, which say nothing.

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """One answer to how far the formulas of speed may be off: standard deviations of log(measured / predicted)."""

    prior_weight: float
    slope: float
    """1 to start from the predicted rates, 0 to start from nothing."""
    common: float
    stage: float
    knobs: float
    parts: float
    """Of the launch, communication and optimizer seconds each, relative to their prediction."""
    micro_batch: float
    accumulation: float
    interaction: float
    """Of what the parts above cannot explain."""


TRUSTS = (
    Trust(prior_weight=0.6, slope=1.0, common=0.4, stage=0.06, knobs=0.06, parts=0.5, micro_batch=0.05,
          accumulation=0.03, interaction=0.02),
    Trust(prior_weight=0.3, slope=1.0, common=0.8, stage=0.20, knobs=0.20, parts=0.8, micro_batch=0.25,
          accumulation=0.12, interaction=0.08),
    Trust(prior_weight=0.1, slope=0.0, common=2.0, stage=0.35, knobs=0.25, parts=0.0, micro_batch=0.80,
          accumulation=0.50, interaction=0.20),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTrust:
    """How far the formulas of memory may be off, as relative standard deviations."""

    common: float = 0.08
    states: float = 0.03
    stage: float = 0.03
    activations: float = 0.12
    knobs: float = 0.10
    """Of the activations under one combination of the other knobs."""
    fixed_bytes: float = 0.7e9


@dataclasses.dataclass(frozen=True, slots=True)
class RatePosterior:
    """Predicted rates under each `Trust`; all arrays have a column for each configuration of the grid."""

    weights: Floats
    means: Floats
    """Natural logarithms of samples/s: (trusts, configurations), likewise below."""
    deviations: Floats
    processes: tuple[Process, ...]
    """Of the errors, for each trust."""

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
            Natural logarithms of samples/s, (about `count`, rows); of each trust as many as it weighs.
        """
        drawn = []
        for weight, mean, process in zip(self.weights, self.means, self.processes, strict=True):
            share = round(float(weight) * count)
            # What the rows have all in common makes it singular; that much of their own is far below any noise.
            root = np.linalg.cholesky(process.covariance(rows) + 1e-8 * np.eye(len(rows)))
            drawn.append(mean[rows] + random.standard_normal((share, len(rows))) @ root.T)
        return np.concatenate(drawn)


@dataclasses.dataclass(frozen=True, slots=True)
class Fragments:
    """What is believed to be lost to fragments, as a fraction of what there is for tensors."""

    for_tensors_bytes: float
    """The capacity less what tensors cannot have (`Hardware.outside_bytes`)."""
    mean: float = FRAGMENTATION
    variance: float = FRAGMENTATION_SPREAD**2
    """Of what all configurations have in common."""

    @property
    def usable_bytes(self) -> float:
        """What tensors can have."""
        return self.for_tensors_bytes * (1 - self.mean)

    @property
    def deviation_bytes(self) -> float:
        """Of what one configuration can have."""
        return self.for_tensors_bytes * math.sqrt(self.variance + OWN_FRAGMENTATION_SPREAD**2)

    def given(self, fraction: float, variance: float) -> "Fragments":
        """After one configuration was seen to lose this fraction, give or take that variance."""
        gain = self.variance / (self.variance + variance + OWN_FRAGMENTATION_SPREAD**2)
        return dataclasses.replace(
            self, mean=self.mean + gain * (fraction - self.mean), variance=self.variance * (1 - gain)
        )

    def given_fits(self, peak_bytes: float) -> "Fragments":
        """After one configuration ran with this peak: it lost no more than the rest."""
        limit = 1 - peak_bytes / self.for_tensors_bytes
        site = _gaussian_of_excess(-self.mean, self.variance + OWN_FRAGMENTATION_SPREAD**2, -limit)
        return self if site is None else self.given(-site[0], site[1])


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPosterior:
    """Predicted peaks of all configurations of the grid."""

    mean_bytes: Floats
    deviation_bytes: Floats
    capacity_bytes: float
    fragments: Fragments

    @property
    def fits(self) -> Floats:
        """Probability that each runs without running out of memory."""
        spread = np.hypot(self.deviation_bytes, self.fragments.deviation_bytes)
        return normal_cdf((self.fragments.usable_bytes - self.mean_bytes) / spread)

    @property
    def certainly_too_large(self) -> npt.NDArray[np.bool_]:
        """Which cannot fit, whatever an allocator does: 5% above the capacity and four deviations."""
        over = self.mean_bytes - self.capacity_bytes
        return np.asarray(over > np.maximum(0.05 * self.capacity_bytes, 4 * self.deviation_bytes))


def calibrate_rates(grid: Grid, observations: Sequence[Observation]) -> RatePosterior:
    """Predicted rates of the whole grid, given what was measured of some of it."""
    timed = [each for each in observations if each.log_rate is not None]
    rows = np.array([each.row for each in timed], dtype=int)
    measured = np.array([each.log_rate for each in timed], dtype=float)
    noise = np.array([RUN_NOISE**2 + each.relative_error**2 for each in timed])
    evidences, means, processes = [], [], []
    for trust in TRUSTS:
        # Without the formulas, what rates are about is not known but for the measurements' own level.
        level = float(np.mean(measured)) if len(rows) else float(np.mean(grid.log_rate))
        start = grid.log_rate if trust.slope else np.full(len(grid), level)
        process = condition(_rate_kernel(grid, trust), rows, measured - start[rows], noise)
        means.append(start + process.mean)
        processes.append(process)
        # Before anything is measured, an answer that starts from nothing has nothing to say.
        speaks = trust.slope or len(rows)
        evidences.append(math.log(trust.prior_weight) + process.log_evidence if speaks else -math.inf)
    relative = np.exp(np.array(evidences) - max(evidences))
    deviations = np.sqrt([process.variances for process in processes])
    return RatePosterior(relative / relative.sum(), np.array(means), deviations, tuple(processes))


def calibrate_memory(
    grid: Grid,
    observations: Sequence[Observation],
    capacity_bytes: float,
    trust: MemoryTrust | None = None,
    *,
    outside_bytes: float = 0.0,
) -> MemoryPosterior:
    """Predicted peaks of the whole grid, given what was measured of some of it.

    Args:
        capacity_bytes: of a rank, after any cap.
        outside_bytes: of these, what tensors cannot have.
    """
    kernel = _memory_kernel(grid, trust or MemoryTrust())
    measured = [each for each in observations if each.peak_bytes is not None]
    rows = np.array([each.row for each in measured], dtype=int)
    peaks = np.array([each.peak_bytes for each in measured], dtype=float)
    residuals, noise = peaks - grid.peak_bytes[rows], (MEMORY_NOISE * peaks) ** 2
    fragments = Fragments(capacity_bytes - outside_bytes)
    for each in measured:
        if each.is_own:  # an earlier study may have had more memory
            fragments = fragments.given_fits(float(each.peak_bytes or 0))
    for each in observations:
        if not each.ran_out:
            continue
        mean, variance = posterior_at(kernel, each.row, rows, residuals, noise)
        # Its peak and its fragments together were above what there is; what each of the two learns from that leaves
        # out what the other did not know.
        limit, lost = fragments.usable_bytes - grid.peak_bytes[each.row], fragments.deviation_bytes**2
        site = _gaussian_of_excess(mean, variance + lost, limit)
        if site is not None:
            value, doubt = site
            rows = np.append(rows, each.row)
            residuals, noise = np.append(residuals, value), np.append(noise, doubt + lost)
            fragments = fragments.given(
                fragments.mean + (value - mean) / fragments.for_tensors_bytes,
                (doubt + variance) / fragments.for_tensors_bytes**2,
            )
    process = condition(kernel, rows, residuals, noise)
    variances = process.variances + (MEMORY_NOISE * grid.peak_bytes) ** 2
    return MemoryPosterior(grid.peak_bytes + process.mean, np.sqrt(variances), capacity_bytes, fragments)


def _gaussian_of_excess(mean: float, variance: float, limit: float) -> tuple[float, float] | None:
    """The (value, variance) whose observation leaves a Gaussian with the moments of itself truncated below `limit`.

    None where the truncation changes next to nothing: the formulas knew.
    """
    spread = math.sqrt(variance)
    above = (limit - mean) / spread
    # Far in the tail the ratio is that of two vanishing numbers; its asymptote is exact to 1% from 6 on.
    hazard = above + 1 / above if above > 6 else _NORMAL.pdf(above) / (1 - _NORMAL.cdf(above))
    shrink = max(1 - hazard * (hazard - above), 0.02)  # of the variance
    if shrink > 0.999:
        return None
    truncated_mean, truncated_variance = mean + spread * hazard, variance * shrink
    precision = 1 / truncated_variance - 1 / variance
    return (truncated_mean / truncated_variance - mean / variance) / precision, 1 / precision


def _rate_kernel(grid: Grid, trust: Trust) -> Kernel:
    def between(one: Rows, other: Rows) -> Floats:
        stage = _alike_stages(grid, one, other)
        knobs = same(grid.knobs, one, other)
        micro = smooth(grid.log2_micro_batch, one, other, length=2.0)
        accumulation = smooth(grid.log2_accumulation, one, other, length=2.0)
        joint = smooth(grid.log2_micro_batch, one, other, length=1.0)
        joint = joint * smooth(grid.log2_accumulation, one, other, length=1.0)
        return np.asarray(
            trust.common**2
            + trust.stage**2 * stage
            + trust.knobs**2 * knobs
            + trust.parts**2 * outer(grid.launch_share, one, other) * (0.5 + 0.25 * stage + 0.25 * knobs)
            + trust.parts**2 * outer(grid.communication_share, one, other) * (0.5 + 0.5 * stage)
            + trust.parts**2 * outer(grid.optimizer_share, one, other) * (0.5 + 0.5 * stage)
            # A stage or a knob that is off is off more where launches or communication dominate: small batches.
            + trust.micro_batch**2 * micro * (0.5 + 0.3 * stage + 0.2 * knobs)
            + trust.accumulation**2 * accumulation * (0.5 + 0.5 * stage)
            + trust.interaction**2 * joint * stage * knobs
        )

    everywhere = (trust.common, trust.stage, trust.knobs, trust.micro_batch, trust.accumulation, trust.interaction)
    shares = grid.launch_share**2 + grid.communication_share**2 + grid.optimizer_share**2
    return Kernel(between, math.fsum(part**2 for part in everywhere) + trust.parts**2 * shares)


def _memory_kernel(grid: Grid, trust: MemoryTrust) -> Kernel:
    def between(one: Rows, other: Rows) -> Floats:
        states = outer(grid.states_bytes, one, other)
        activations = outer(grid.activation_bytes, one, other)
        peaks = outer(grid.peak_bytes, one, other)
        return np.asarray(
            trust.common**2 * peaks
            + states * (trust.states**2 + trust.stage**2 * same(grid.stage, one, other))
            + activations * (trust.activations**2 + trust.knobs**2 * same(grid.knobs, one, other))
            + trust.fixed_bytes**2
        )

    variances = (
        (trust.common * grid.peak_bytes) ** 2
        + (trust.states**2 + trust.stage**2) * grid.states_bytes**2
        + (trust.activations**2 + trust.knobs**2) * grid.activation_bytes**2
        + trust.fixed_bytes**2
    )
    return Kernel(between, variances)


def _alike_stages(grid: Grid, one: Rows, other: Rows) -> Floats:
    whole = grid.stage < 3
    in_common = STAGES_IN_COMMON_ON_ONE if grid.ranks == 1 else STAGES_IN_COMMON
    return np.maximum(same(grid.stage, one, other), in_common * np.logical_and.outer(whole[one], whole[other]))
