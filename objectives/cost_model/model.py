"""`CostModel`: predicted bytes and seconds of configurations, for one workload on one hardware."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ds_tune.objectives.cost_model.architecture import Architecture, architecture_of
from ds_tune.objectives.cost_model.hardware import Hardware
from ds_tune.objectives.cost_model.memory import (
    DEFAULT_BUCKET_ELEMENTS,
    MemoryConstants,
    MemoryEstimate,
    predict_memory,
)
from ds_tune.objectives.cost_model.step_inputs import StepConstants
from ds_tune.objectives.cost_model.step_time import StepEstimate, predict_step
from ds_tune.objectives.ds_config import CPU_BUCKET_ELEMENTS
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import Workload

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The prior, before any measurement has corrected it."""

    config: TrialConfig
    memory: MemoryEstimate
    step: StepEstimate


class CostModel:
    """The formulas, with everything but the configuration filled in."""

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
            UsageError: the model's configuration cannot be had, or has no sizes.
        """
        self.workload = workload
        self.hardware = hardware
        self.architecture = architecture or architecture_of(workload)
        self._attention = attention
        self._memory_constants = memory_constants
        self._step_constants = step_constants
        zero = workload.base_ds_config.get("zero_optimization", {})
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
                seq_len=self.workload.seq_len,
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
                seq_len=self.workload.seq_len,
                dtype=dtype,
                constants=self._step_constants,
            ),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The prior over many configurations, as columns; row i is `configs[i]`."""

    configs: tuple[TrialConfig, ...]
    ranks: int
    stage: Floats
    log2_micro_batch: Floats
    log2_accumulation: Floats
    knobs: npt.NDArray[np.int64]
    """A number for each combination of the other knobs that occurs."""
    log_rate: Floats
    """Predicted natural logarithm of samples/s."""
    launch_share: Floats
    """The part of the predicted step that launching kernels decides, likewise below."""
    communication_share: Floats
    optimizer_share: Floats
    states_bytes: Floats
    """Bytes of the states at the moment that is predicted to be the peak, likewise below."""
    activation_bytes: Floats
    peak_bytes: Floats
    large_bytes: Floats
    """Bytes of it that an allocator has to find in a few large pieces."""

    def __len__(self) -> int:
        return len(self.configs)


def grid_of(model: CostModel, configs: Sequence[TrialConfig]) -> Grid:
    """The predictions for many configurations."""
    predictions = [model.predict(config) for config in configs]
    others = [
        tuple(
            (name, value)
            for name, value in config.to_json().items()
            if name not in ("zero_stage", "micro_batch_size", "gradient_accumulation_steps")
        )
        for config in configs
    ]
    numbers = {knobs: number for number, knobs in enumerate(dict.fromkeys(others))}
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
        ranks=model.hardware.ranks,
        stage=np.array([config.zero_stage for config in configs], dtype=float),
        log2_micro_batch=np.log2([config.micro_batch_size for config in configs]),
        log2_accumulation=np.log2([config.gradient_accumulation_steps for config in configs]),
        knobs=np.array([numbers[knobs] for knobs in others]),
        log_rate=np.log([p.step.samples_per_second for p in predictions]),
        launch_share=np.array([p.step.launch_share for p in predictions]),
        communication_share=np.array([p.step.communication / p.step.seconds for p in predictions]),
        optimizer_share=np.array([p.step.optimizer / p.step.seconds for p in predictions]),
        states_bytes=np.array(states),
        activation_bytes=np.array(activations),
        peak_bytes=np.array(states) + np.array(activations),
        large_bytes=np.array([prediction.memory.large_bytes for prediction in predictions]),
    )
