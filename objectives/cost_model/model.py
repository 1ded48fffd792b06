"""`CostModel`: predicted bytes and seconds of configurations, for one workload on one hardware."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ds_tune.objectives.cost_model.architecture import Architecture, architecture_of
from ds_tune.objectives.cost_model.grid import Grid, knob_numbers
from ds_tune.objectives.cost_model.hardware import Hardware
from ds_tune.objectives.cost_model.memory import (
    DEFAULT_BUCKET_ELEMENTS,
    MemoryConstants,
    MemoryEstimate,
    predict_memory,
)
from ds_tune.objectives.cost_model.prior import ERROR_PRIORS, MEMORY_ERRORS
from ds_tune.objectives.cost_model.step_inputs import StepConstants
from ds_tune.objectives.cost_model.step_time import StepEstimate, predict_step
from ds_tune.objectives.ds_config import CPU_BUCKET_ELEMENTS
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The prior, before any measurement has corrected it."""

    config: TrialConfig
    memory: MemoryEstimate
    step: StepEstimate


class CostModel:
    """The formulas, with everything but the configuration filled in: the `Prior` of a training whose model is known."""

    predicts = True
    error_priors = ERROR_PRIORS
    memory_errors = MEMORY_ERRORS

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        *,
        architecture: Architecture | None = None,
        attention: str = "sdpa",
        memory_constants: MemoryConstants | None = None,
        step_constants: StepConstants | None = None,
    ) -> None:
        """
        Args:
            architecture: where it is not to be read from the workload's model.
            attention: see `predict_memory`.

        Raises:
            UsageError: the model's configuration cannot be had or has no sizes, or samples differ in length.
        """
        self.workload = workload
        self.hardware = hardware
        self.architecture = architecture or architecture_of(workload)
        tokens = workload.tokens_per_sample
        if tokens is None:
            raise UsageError(f"the samples of {workload.title} differ in length")
        self.seq_len = tokens
        """Tokens of a sample."""
        self._attention = attention
        self._memory_constants = memory_constants
        self._step_constants = step_constants
        zero = workload.base_ds_config.get("zero_optimization")
        zero = zero if isinstance(zero, Mapping) else {}  # "auto", or the old form: true
        default = CPU_BUCKET_ELEMENTS if hardware.device == "cpu" else DEFAULT_BUCKET_ELEMENTS
        bucket = zero.get("reduce_bucket_size", default)
        self._bucket_elements = int(bucket) if isinstance(bucket, int | float) else default

    def predict(self, config: TrialConfig) -> Prediction:
        """Bytes and seconds of one configuration."""
        dtype = config.trained_dtype(self.workload.dtype)
        return Prediction(
            config=config,
            memory=predict_memory(
                config,
                self.architecture,
                ranks=self.hardware.ranks,
                seq_len=self.seq_len,
                dtype=dtype,
                device=self.hardware.device,
                attention=self._attention,
                bucket_elements=self._bucket_elements,
                constants=self._memory_constants,
            ),
            step=predict_step(
                config,
                self.architecture,
                self.hardware,
                seq_len=self.seq_len,
                dtype=dtype,
                constants=self._step_constants,
            ),
        )

    def grid(self, configs: Sequence[TrialConfig]) -> Grid:
        """The predictions for many configurations."""
        predictions = [self.predict(config) for config in configs]
        states, activations = [], []
        for prediction in predictions:
            memory = prediction.memory
            if memory.backward_bytes >= memory.step_bytes:
                states.append(memory.backward_bytes - memory.batch_bytes)
                activations.append(memory.batch_bytes)
            else:
                states.append(memory.step_bytes)
                activations.append(0.0)
        return Grid(
            configs=tuple(configs),
            ranks=self.hardware.ranks,
            stage=np.array([config.zero_stage for config in configs], dtype=float),
            log2_micro_batch=np.log2([config.micro_batch_size for config in configs]),
            log2_accumulation=np.log2([config.gradient_accumulation_steps for config in configs]),
            knobs=knob_numbers(configs),
            log_rate=np.log([p.step.samples_per_second for p in predictions]),
            launch_share=np.array([p.step.launch_share for p in predictions]),
            communication_share=np.array([p.step.communication / p.step.seconds for p in predictions]),
            optimizer_share=np.array([p.step.optimizer / p.step.seconds for p in predictions]),
            states_bytes=np.array(states),
            activation_bytes=np.array(activations),
            peak_bytes=np.array(states) + np.array(activations),
            large_bytes=np.array([prediction.memory.large_bytes for prediction in predictions]),
        )
