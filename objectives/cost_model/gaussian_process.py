"""Gaussian processes over the rows of a grid: covariances made of simple terms, and what measurements make of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_tune.objectives.cost_model.grid import Floats

Rows = npt.NDArray[np.int64]
"""Which rows of a grid."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """Covariance of configurations' errors."""

    between: Callable[[Rows, Rows], Floats]
    """The covariance of two sets of rows of the grid, as a matrix."""
    variances: Floats
    """Variance of each row alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Posterior:
    """A process of mean zero, given noisy values at some rows."""

    kernel: Kernel
    rows: Rows
    """Where it was measured."""
    lower: Floats
    """Cholesky factor of the covariance of what was measured, noise included."""
    mean: Floats
    """At all rows of the grid, as are the next."""
    variances: Floats
    log_evidence: float
    """Logarithm of the probability density of what was measured."""

    def covariance(self, rows: Rows) -> Floats:
        """Between these rows, as a matrix."""
        prior = self.kernel.between(rows, rows)
        if len(self.rows) == 0:
            return prior
        explained = np.linalg.solve(self.lower, self.kernel.between(self.rows, rows))
        return np.asarray(prior - explained.T @ explained)


def condition(kernel: Kernel, rows: Rows, residuals: Floats, noise: Floats) -> Posterior:
    """The process given these residuals at these rows, each with its variance of noise."""
    prior = kernel.variances
    if len(rows) == 0:
        return Posterior(kernel, rows, np.zeros((0, 0)), np.zeros_like(prior), prior, 0.0)
    among = kernel.between(rows, rows) + np.diag(noise)
    lower = np.asarray(np.linalg.cholesky(among))
    weights = np.linalg.solve(among, residuals)
    across = kernel.between(rows, np.arange(len(prior)))
    explained = np.linalg.solve(lower, across)
    evidence = -0.5 * float(residuals @ weights) - float(np.log(np.diag(lower)).sum())
    evidence -= 0.5 * len(rows) * math.log(2 * math.pi)
    variances = np.maximum(prior - (explained**2).sum(axis=0), 1e-9 * prior)
    return Posterior(kernel, rows, lower, across.T @ weights, variances, evidence)


def posterior_at(kernel: Kernel, row: int, rows: Rows, residuals: Floats, noise: Floats) -> tuple[float, float]:
    """(mean, variance) at one row."""
    prior = float(kernel.variances[row])
    if len(rows) == 0:
        return 0.0, prior
    among = kernel.between(rows, rows) + np.diag(noise)
    across = kernel.between(rows, np.array([row]))[:, 0]
    weights = np.linalg.solve(among, across)
    return float(weights @ residuals), max(prior - float(weights @ across), 1e-9 * prior)


def outer(values: Floats, one: Rows, other: Rows) -> Floats:
    return np.multiply.outer(values[one], values[other])


def same(values: npt.NDArray[Any], one: Rows, other: Rows) -> Floats:
    return np.asarray(np.equal.outer(values[one], values[other]), dtype=np.float64)


def smooth(values: Floats, one: Rows, other: Rows, *, length: float) -> Floats:
    distance = np.subtract.outer(values[one], values[other]) / length
    return np.asarray(np.exp(-0.5 * distance**2))


def normal_cdf(values: Floats) -> Floats:
    """The standard normal distribution function (Abramowitz and Stegun 7.1.26, error below 2e-7)."""
    scaled = np.abs(values) / math.sqrt(2)
    step = 1 / (1 + 0.3275911 * scaled)
    series = np.polyval([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0], step)
    tail = 0.5 * series * np.exp(-(scaled**2))
    return np.asarray(np.where(values > 0, 1 - tail, tail))
