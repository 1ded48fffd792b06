"""Processes over the rows of a grid, given noisy values at some of them."""

from statistics import NormalDist

import numpy as np
import pytest

from ds_tune.objectives.cost_model.gaussian_process import Kernel, condition, normal_cdf, posterior_at, smooth
from ds_tune.objectives.cost_model.grid import Floats

PLACES = np.linspace(0.0, 4.0, 9)
KERNEL = Kernel(lambda one, other: 0.5 + smooth(PLACES, one, other, length=1.0), np.full(len(PLACES), 1.5))
ALL = np.arange(len(PLACES))
MEASURED = np.array([0, 5])
RESIDUALS = np.array([1.0, -0.5])
NOISE = np.array([0.01, 0.04])


def test_conditioned_gaussian_process_equals_the_joint_normal_posterior() -> None:
    """The textbook's inverse, of a matrix that is small enough for it."""
    process = condition(KERNEL, MEASURED, RESIDUALS, NOISE)
    inverse = np.linalg.inv(KERNEL.between(MEASURED, MEASURED) + np.diag(NOISE))
    across: Floats = KERNEL.between(ALL, MEASURED)
    assert process.mean == pytest.approx(across @ inverse @ RESIDUALS)
    covariance = KERNEL.between(ALL, ALL) - across @ inverse @ across.T
    assert process.covariance(ALL) == pytest.approx(covariance)
    assert process.variances == pytest.approx(np.diag(covariance))


def test_one_row_alone_is_the_same_as_in_the_grid() -> None:
    process = condition(KERNEL, MEASURED, RESIDUALS, NOISE)
    for row in (0, 3, 8):
        mean, variance = posterior_at(KERNEL, row, MEASURED, RESIDUALS, NOISE)
        assert (mean, variance) == pytest.approx((process.mean[row], process.variances[row]))


def test_before_anything_is_measured_it_is_the_prior() -> None:
    nothing = np.array([], dtype=int)
    process = condition(KERNEL, nothing, np.array([]), np.array([]))
    assert not process.mean.any()
    assert process.covariance(ALL) == pytest.approx(KERNEL.between(ALL, ALL))


def test_log_evidence_is_higher_where_neighbours_agree() -> None:
    """Neighbours that agree, rather than neighbours that don't."""
    neighbours = np.array([3, 4])
    evidences = [
        condition(KERNEL, neighbours, np.array([0.7, other]), NOISE).log_evidence for other in (0.7, 0.0, -0.7)
    ]
    assert evidences == sorted(evidences, reverse=True)


def test_the_normal_distribution_is_that_of_the_standard_library() -> None:
    values = np.linspace(-8, 8, 161)
    assert normal_cdf(values) == pytest.approx([NormalDist().cdf(value) for value in values], abs=1e-6)
