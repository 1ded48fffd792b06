"""Beliefs about configurations before the first trial: from formulas (`CostModel`), or flat (`FlatPrior`)."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ds_tune.objectives.cost_model.grid import Grid, knob_numbers
from ds_tune.objectives.cost_model.hardware import Hardware
from ds_tune.objectives.trial import TrialConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPrior:
    """One answer to how far the formulas of speed may be off: standard deviations of log(measured / predicted)."""

    prior_weight: float
    slope: float
    """1 to start from the predicted rates, 0 to start from nothing."""
    common: float
    stage: float
    knobs: float
    launch: float
    """Relative error of the seconds of launching kernels. Where they decide, rates on nine machines with their models
    were off by 6 to 32% in the median (benchmarks/rate_model.py)."""
    parts: float
    """Relative error of the communication and optimizer seconds each."""
    micro_batch: float
    accumulation: float
    interaction: float
    """Error that the parts above cannot explain."""


ERROR_PRIORS = (
    ErrorPrior(prior_weight=0.6, slope=1.0, common=0.4, stage=0.06, knobs=0.06, launch=0.25, parts=0.5,
          micro_batch=0.05, accumulation=0.03, interaction=0.02),
    ErrorPrior(prior_weight=0.3, slope=1.0, common=0.8, stage=0.20, knobs=0.20, launch=0.8, parts=0.8,
          micro_batch=0.25, accumulation=0.12, interaction=0.08),
    ErrorPrior(prior_weight=0.1, slope=0.0, common=2.0, stage=0.35, knobs=0.25, launch=0.0, parts=0.0,
          micro_batch=0.80, accumulation=0.50, interaction=0.20),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryErrors:
    """How far predicted peaks may be off: relative standard deviations of the parts of a peak."""

    common: float
    """All peaks together."""
    states: float
    stage: float
    """The states' bytes under one ZeRO stage."""
    activations: float
    knobs: float
    """The activations' bytes under one combination of the other knobs."""
    fixed_bytes: float
    """Standard deviation of what every configuration has."""


MEMORY_ERRORS = MemoryErrors(common=0.06, states=0.02, stage=0.02, activations=0.07, knobs=0.06, fixed_bytes=0.4e9)
"""Errors of the formulas: the variances of two answers in one, that they are off by about 2%, as on all machines so far
(70%), or by about 10% (30%)."""


class Prior(Protocol):
    """Beliefs about configurations before anything was measured."""

    @property
    def hardware(self) -> Hardware: ...

    @property
    def predicts(self) -> bool:
        """Whether its figures mean something before anything was measured, so that they are worth telling."""

    @property
    def error_priors(self) -> Sequence[ErrorPrior]:
        """Answers to how far the rates may be off, kept side by side."""

    @property
    def memory_errors(self) -> MemoryErrors: ...

    def grid(self, configs: Sequence[TrialConfig]) -> Grid:
        """Predictions of these configurations."""


FLAT_STATES, FLAT_SAMPLE = 0.3, 0.04
"""Fractions of a rank's memory that states and a sample's activations are taken to need, give or take as much."""


class FlatPrior:
    """Beliefs about a training of whose model nothing is known: any configuration may be the fastest.

    That a larger micro-batch needs more memory, and that alike configurations train alike, is all there is to begin
    with; measurements do the rest.
    """

    predicts = False
    error_priors = (dataclasses.replace(ERROR_PRIORS[-1], prior_weight=1.0),)
    memory_errors = MemoryErrors(common=0.3, states=0.7, stage=0.3, activations=1.0, knobs=0.5, fixed_bytes=0.4e9)

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def grid(self, configs: Sequence[TrialConfig]) -> Grid:
        """The same rate for each of these configurations, and peaks that grow with the micro-batch."""
        count, capacity = len(configs), float(self.hardware.capacity_bytes)
        micro_batch: np.ndarray[tuple[int], np.dtype[np.float64]] = np.array(
            [config.micro_batch_size for config in configs], dtype=float
        )
        states = np.full(count, FLAT_STATES * capacity)
        activations = FLAT_SAMPLE * capacity * micro_batch
        nothing = np.zeros(count)
        return Grid(
            configs=tuple(configs),
            ranks=self.hardware.ranks,
            stage=np.array([config.zero_stage for config in configs], dtype=float),
            log2_micro_batch=np.log2(micro_batch),
            log2_accumulation=np.log2([config.gradient_accumulation_steps for config in configs]),
            knobs=knob_numbers(configs),
            log_rate=nothing,
            launch_share=nothing,
            communication_share=nothing,
            optimizer_share=nothing,
            states_bytes=states,
            activation_bytes=activations,
            peak_bytes=states + activations,
            large_bytes=nothing,
        )
