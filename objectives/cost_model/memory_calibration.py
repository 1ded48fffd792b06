"""Predicted peaks corrected by measurements, and what is lost to fragments: which configurations fit.

The errors of a peak's parts (states, activations) are a Gaussian process over the configurations, so that two
measurements tell the slope of every micro-batch size. A run out of memory says only that a peak and what was lost to
fragments are together above the capacity: it enters as the Gaussian with the moments of the truncated one
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
    Rows,
    condition,
    normal_cdf,
    outer,
    posterior_at,
    same,
)
from ds_tune.objectives.cost_model.grid import Floats, Grid
from ds_tune.objectives.cost_model.prior import MEMORY_ERRORS, MemoryErrors

MEMORY_NOISE = 0.008
"""Relative standard deviation of a measured peak about a smooth function."""

LOST_SHARE = 0.65
"""Fraction of `Grid.large_bytes` lost to fragments: those few tensors find no free piece that is large enough, though
there is enough in all. From 20 configurations on an H100 that were run under ever smaller caps (docs/cost-model.md)."""
LOST_SHARE_DEVIATION = 0.34
"""Standard deviation of that fraction: of two configurations with the same peak one may fit."""

SMALL_FRAGMENTS = 0.005
"""Fraction of the capacity lost to all other tensors, give or take as much."""

_NORMAL = NormalDist()


def usable_bytes(for_tensors_bytes: float, large_bytes: Floats | float) -> Floats:
    """Largest peaks that are expected to fit, of configurations whose large tensors have so many bytes.

    Args:
        for_tensors_bytes: the capacity less what tensors cannot have (`Hardware.outside_bytes`).
    """
    return np.asarray((1 - SMALL_FRAGMENTS) * for_tensors_bytes - LOST_SHARE * large_bytes)


def usable_deviation_bytes(for_tensors_bytes: float, large_bytes: Floats | float) -> Floats:
    """Standard deviations of the usable bytes."""
    return np.hypot(LOST_SHARE_DEVIATION * large_bytes, SMALL_FRAGMENTS * for_tensors_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPosterior:
    """Predicted peaks; all arrays have an element for each configuration of the grid."""

    mean_bytes: Floats
    deviation_bytes: Floats
    large_bytes: Floats
    capacity_bytes: float
    for_tensors_bytes: float
    ran_out: Rows
    """Configurations that did run out of memory."""

    @property
    def fits(self) -> Floats:
        """Probability that each runs without running out of memory."""
        room = usable_bytes(self.for_tensors_bytes, self.large_bytes) - self.mean_bytes
        spread = np.hypot(self.deviation_bytes, usable_deviation_bytes(self.for_tensors_bytes, self.large_bytes))
        found = normal_cdf(room / spread)
        found[self.ran_out] = 0.0
        return found

    @property
    def certainly_too_large(self) -> npt.NDArray[np.bool_]:
        """Configurations that cannot fit, whatever an allocator does: 5% above the capacity and four deviations."""
        over = self.mean_bytes - self.capacity_bytes
        return np.asarray(over > np.maximum(0.05 * self.capacity_bytes, 4 * self.deviation_bytes))


def calibrate_memory(
    grid: Grid,
    observations: Sequence[Observation],
    capacity_bytes: float,
    *,
    outside_bytes: float = 0.0,
    errors: MemoryErrors = MEMORY_ERRORS,
) -> MemoryPosterior:
    """Predicted peaks of the whole grid, given what was measured of some of it.

    Args:
        capacity_bytes: of a rank, after any cap.
        outside_bytes: of these, what tensors cannot have.
        errors: how far the predictions may be off.
    """
    kernel, for_tensors_bytes = _kernel(grid, errors), capacity_bytes - outside_bytes
    measured = [each for each in observations if each.peak_bytes is not None]
    rows = np.array([each.row for each in measured], dtype=int)
    peaks = np.array([each.peak_bytes for each in measured], dtype=float)
    residuals, noise = peaks - grid.peak_bytes[rows], (MEMORY_NOISE * peaks) ** 2
    ran_out = np.array([each.row for each in observations if each.ran_out], dtype=int)
    for row in ran_out:
        large = float(grid.large_bytes[row])
        mean, variance = posterior_at(kernel, row, rows, residuals, noise)
        limit = float(usable_bytes(for_tensors_bytes, large)) - grid.peak_bytes[row]
        lost_variance = float(usable_deviation_bytes(for_tensors_bytes, large)) ** 2
        # Its peak and its fragments together were above what there is; the peak learns what fragments leave to it.
        excess = _gaussian_of_excess(mean, variance + lost_variance, limit)
        if excess is not None:
            rows = np.append(rows, row)
            residuals, noise = np.append(residuals, excess[0]), np.append(noise, excess[1] + lost_variance)
    process = condition(kernel, rows, residuals, noise)
    return MemoryPosterior(
        mean_bytes=grid.peak_bytes + process.mean,
        deviation_bytes=np.sqrt(process.variances + (MEMORY_NOISE * grid.peak_bytes) ** 2),
        large_bytes=grid.large_bytes,
        capacity_bytes=capacity_bytes,
        for_tensors_bytes=for_tensors_bytes,
        ran_out=ran_out,
    )


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


def _kernel(grid: Grid, errors: MemoryErrors) -> Kernel:
    def between(one: Rows, other: Rows) -> Floats:
        states = outer(grid.states_bytes, one, other)
        activations = outer(grid.activation_bytes, one, other)
        return np.asarray(
            errors.common**2 * outer(grid.peak_bytes, one, other)
            + states * (errors.states**2 + errors.stage**2 * same(grid.stage, one, other))
            + activations * (errors.activations**2 + errors.knobs**2 * same(grid.knobs, one, other))
            + errors.fixed_bytes**2
        )

    variances = (
        (errors.common * grid.peak_bytes) ** 2
        + (errors.states**2 + errors.stage**2) * grid.states_bytes**2
        + (errors.activations**2 + errors.knobs**2) * grid.activation_bytes**2
        + errors.fixed_bytes**2
    )
    return Kernel(between, variances)
