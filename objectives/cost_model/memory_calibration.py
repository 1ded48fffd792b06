"""Predicted peaks corrected by measurements, and what is lost to fragments: which configurations fit.

The predicted parts of a peak (states, activations) each carry a factor, so that two measurements tell the slope of
every micro-batch size. Two answers to how far the formulas are to be trusted are kept side by side, each weighed by how
well it explains what ran and what ran out (Bayesian model averaging). A run out of memory says only that a peak and
what was lost beside it are together above the capacity: it enters as the Gaussian with the moments of the truncated one
(assumed-density filtering, Minka 2001).
"""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ds_tune.objectives.cost_model.calibration import Observation
from ds_tune.objectives.cost_model.gaussian_process import (
    Kernel,
    Posterior,
    Rows,
    condition,
    normal_cdf,
    outer,
    posterior_at,
    same,
)
from ds_tune.objectives.cost_model.model import Floats, Grid

MEMORY_NOISE = 0.008
"""Relative standard deviation of a measured peak about a smooth function."""

LOST_SHARE = 0.65
"""Of `Grid.large_bytes`, lost to fragments: those few tensors find no free piece that is large enough, though there is
enough in all. From 20 configurations on an H100 that were run under ever smaller caps:
docs/log/2026-11-26-memory-fragments.md."""
LOST_SHARE_SPREAD = 0.15
"""How far that may be off on a machine with a model: the same for all of a study, so that it is learned."""
OWN_LOST_SHARE_SPREAD = 0.3
"""How far a single configuration differs from that: of two with the same peak one may fit."""

SMALL_FRAGMENTS = 0.005
"""Of the capacity, lost to all other tensors, give or take as much."""

BELIEVED = 1e-3
"""An answer of less weight has been refuted."""

_NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTrust:
    """One answer to how far the formulas of memory may be off: relative standard deviations."""

    prior_weight: float
    common: float
    states: float
    stage: float
    activations: float
    knobs: float
    """Of the activations under one combination of the other knobs."""
    fixed_bytes: float


PEAK_ERROR_PRIORS = (
    MemoryTrust(prior_weight=0.7, common=0.015, states=0.01, stage=0.01, activations=0.02, knobs=0.02,
                fixed_bytes=0.2e9),
    MemoryTrust(prior_weight=0.3, common=0.08, states=0.03, stage=0.03, activations=0.12, knobs=0.10,
                fixed_bytes=0.7e9),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Fragments:
    """What is believed to be lost to fragments: a share of a configuration's large tensors."""

    for_tensors_bytes: float
    """The capacity less what tensors cannot have (`Hardware.outside_bytes`)."""
    share: float = LOST_SHARE
    variance: float = LOST_SHARE_SPREAD**2
    """Of what all configurations have in common."""

    def usable_bytes(self, large_bytes: Floats | float) -> Floats:
        """What the peaks of configurations can be whose large tensors have so many bytes."""
        return np.asarray((1 - SMALL_FRAGMENTS) * self.for_tensors_bytes - self.share * large_bytes)

    def deviation_bytes(self, large_bytes: Floats | float) -> Floats:
        """How far each of them may differ from that."""
        share = math.sqrt(self.variance + OWN_LOST_SHARE_SPREAD**2)
        return np.hypot(share * large_bytes, SMALL_FRAGMENTS * self.for_tensors_bytes)

    def given(self, share: float, variance: float) -> "Fragments":
        """After one configuration was seen to lose this share, give or take that variance."""
        gain = self.variance / (self.variance + variance + OWN_LOST_SHARE_SPREAD**2)
        return dataclasses.replace(
            self, share=self.share + gain * (share - self.share), variance=self.variance * (1 - gain)
        )

    def given_fits(self, peak_bytes: float, large_bytes: float) -> "Fragments":
        """After one configuration ran with this peak: it lost no more than the rest."""
        room = (1 - SMALL_FRAGMENTS) * self.for_tensors_bytes - peak_bytes
        site = _gaussian_of_excess(-self.share, self.variance + OWN_LOST_SHARE_SPREAD**2, -max(room, 0.0) / large_bytes)
        return self if site is None else self.given(-site[0], site[1])


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPosterior:
    """Predicted peaks under each `MemoryTrust`; all arrays have a column for each configuration of the grid."""

    weights: Floats
    means: Floats
    """Bytes: (answers, configurations), likewise below."""
    deviations: Floats
    fragments: tuple[Fragments, ...]
    """By each answer."""
    large_bytes: Floats
    capacity_bytes: float

    @property
    def mean_bytes(self) -> Floats:
        return np.asarray(self.weights @ self.means)

    @property
    def deviation_bytes(self) -> Floats:
        spread = self.deviations**2 + (self.means - self.mean_bytes) ** 2
        return np.sqrt(self.weights @ spread)

    @property
    def fits(self) -> Floats:
        """Probability that each runs without running out of memory."""
        found = np.zeros(self.means.shape[1])
        for weight, mean, deviation, lost in zip(
            self.weights, self.means, self.deviations, self.fragments, strict=True
        ):
            spread = np.hypot(deviation, lost.deviation_bytes(self.large_bytes))
            found += weight * normal_cdf((lost.usable_bytes(self.large_bytes) - mean) / spread)
        return np.minimum(found, 1.0)  # weights add up to 1 but for rounding

    @property
    def certainly_too_large(self) -> npt.NDArray[np.bool_]:
        """Which cannot fit, whatever an allocator does: 5% above the capacity and four deviations, by all answers."""
        over = self.means - self.capacity_bytes
        by_each = over > np.maximum(0.05 * self.capacity_bytes, 4 * self.deviations)
        return np.asarray(by_each[self.weights > BELIEVED].all(axis=0))


def calibrate_memory(
    grid: Grid, observations: Sequence[Observation], capacity_bytes: float, *, outside_bytes: float = 0.0
) -> MemoryPosterior:
    """Predicted peaks of the whole grid, given what was measured of some of it.

    Args:
        capacity_bytes: of a rank, after any cap.
        outside_bytes: of these, what tensors cannot have.
    """
    answers = [
        _answer(grid, observations, Fragments(capacity_bytes - outside_bytes), each) for each in PEAK_ERROR_PRIORS
    ]
    evidences = np.array(
        [
            math.log(each.prior_weight) + evidence
            for each, (_, _, evidence) in zip(PEAK_ERROR_PRIORS, answers, strict=True)
        ]
    )
    relative = np.exp(evidences - evidences.max())
    noise = (MEMORY_NOISE * grid.peak_bytes) ** 2
    return MemoryPosterior(
        weights=relative / relative.sum(),
        means=np.array([grid.peak_bytes + process.mean for process, _, _ in answers]),
        deviations=np.sqrt([process.variances + noise for process, _, _ in answers]),
        fragments=tuple(fragments for _, fragments, _ in answers),
        large_bytes=grid.large_bytes,
        capacity_bytes=capacity_bytes,
    )


def _answer(
    grid: Grid, observations: Sequence[Observation], fragments: Fragments, trust: MemoryTrust
) -> tuple[Posterior, Fragments, float]:
    """The errors of the peaks, what is lost, and the logarithm of how well it explains the observations."""
    kernel = _kernel(grid, trust)
    measured = [each for each in observations if each.peak_bytes is not None]
    rows = np.array([each.row for each in measured], dtype=int)
    peaks = np.array([each.peak_bytes for each in measured], dtype=float)
    residuals, noise = peaks - grid.peak_bytes[rows], (MEMORY_NOISE * peaks) ** 2
    evidence = condition(kernel, rows, residuals, noise).log_evidence
    for each in measured:
        if each.from_this_study:  # an earlier study may have had more memory
            fragments = fragments.given_fits(float(each.peak_bytes or 0), float(grid.large_bytes[each.row]))
    for each in observations:
        if not each.ran_out:
            continue
        # Its peak and its fragments together were above what there is; what each of the two learns from that leaves
        # out what the other did not know.
        large = float(grid.large_bytes[each.row])
        mean, variance = posterior_at(kernel, each.row, rows, residuals, noise)
        limit = float(fragments.usable_bytes(large)) - grid.peak_bytes[each.row]
        lost = float(fragments.deviation_bytes(large)) ** 2
        evidence += _log_probability_above((limit - mean) / math.sqrt(variance + lost))
        site = _gaussian_of_excess(mean, variance + lost, limit)
        if site is not None:
            value, doubt = site
            rows = np.append(rows, each.row)
            residuals, noise = np.append(residuals, value), np.append(noise, doubt + lost)
            fragments = fragments.given(fragments.share + (value - mean) / large, (doubt + variance) / large**2)
    return condition(kernel, rows, residuals, noise), fragments, evidence


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


def _log_probability_above(deviations: float) -> float:
    """The logarithm of the probability that a standard normal variable is above this."""
    if deviations > 6:
        return -0.5 * deviations**2 - math.log(deviations * math.sqrt(2 * math.pi))
    return math.log(1 - _NORMAL.cdf(deviations))


def _kernel(grid: Grid, trust: MemoryTrust) -> Kernel:
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
