"""The cost model against the eight published results of DeepSpeed's autotuner, on one node of 16 V100-32GB.

    python benchmarks/published.py

What is compared: the micro-batch that runs out of memory (the published one fits, what was tried next did not), the
order of the ZeRO stages, and samples/s. Each model is predicted with four factors fitted to the others alone: one of
activation bytes, to all of them; those of compute, the optimizer and ZeRO-2's reduction to the models of its precision,
for the libraries of 2021 differ from today's. The sequence lengths are those of the scripts that go with the results
(1024 for GPT-2, 256 for DeBERTa, 128 for the others); the encoders were fine-tuned to classify, so that they have no
logits to speak of.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tabulate
from scipy.optimize import least_squares

from ds_tune.objectives.cost_model.architecture import Architecture, architecture_from_config
from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.memory import MemoryConstants
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.step_inputs import StepConstants
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One row of the published tables."""

    model: str
    config: dict[str, Any]
    seq_len: int
    dtype: str
    hand: tuple[int, int, float]
    """(stage, mbs, samples/s) of the hand-tuned run: mbs doubled from 1 until out of memory."""
    tuned: tuple[int, int, float]
    """(stage, mbs, samples/s) of the autotuned run."""
    best_of_stage: dict[int, float]
    """The autotuner's own metric, as far as it printed it: only their ratios are used."""
    mbs_of_stage: dict[int, int] = dataclasses.field(default_factory=dict)
    """The micro-batch of each of these, where it is known; else the largest that is predicted to fit."""
    causal: bool = True
    ended_at_memory: bool = True
    """Whether a larger micro-batch ran out of memory; else the script's batch size ended the search."""


_BERT = {"model_type": "bert"}
_LARGE = {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
          "intermediate_size": 4096}  # fmt: skip
_DEBERTA = {"model_type": "deberta-v2", "num_hidden_layers": 48, "relative_attention": True, "position_buckets": 256,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False, "conv_kernel_size": 3}  # fmt: skip

ROWS = (
    Published(model="DistilBERT", config={"model_type": "distilbert"}, seq_len=128, dtype="fp32", causal=False,
              hand=(0, 256, 5305.067), tuned=(0, 256, 5305.067), best_of_stage={}, ended_at_memory=False),
    Published(model="BERT-base", config=_BERT, seq_len=128, dtype="fp32", causal=False,
              hand=(0, 128, 2523.684), tuned=(0, 235, 2736.561),
              best_of_stage={0: 2930.18, 1: 2930.17, 2: 2744.16, 3: 2479.47}),
    Published(model="BERT-large", config=_LARGE, seq_len=128, dtype="fp32", causal=False,
              hand=(1, 64, 766.929), tuned=(1, 93, 808.168), best_of_stage={0: 835.244, 1: 842.243, 2: 764.524}),
    Published(model="GPT2", config=SHIPPED_MODELS["gpt2"], seq_len=1024, dtype="fp16",
              hand=(1, 8, 397.827), tuned=(1, 15, 431.586), best_of_stage={0: 441.693, 1: 452.004},
              mbs_of_stage={0: 11, 1: 15}),
    Published(model="GPT2-medium", config=SHIPPED_MODELS["gpt2-medium"], seq_len=1024, dtype="fp16",
              hand=(1, 4, 142.211), tuned=(1, 6, 163.3), best_of_stage={0: 167.688, 1: 175.46, 2: 161.619},
              mbs_of_stage={0: 5, 1: 6, 2: 6}),
    Published(model="GPT2-large", config=SHIPPED_MODELS["gpt2-large"], seq_len=1024, dtype="fp16",
              hand=(1, 2, 56.797), tuned=(1, 3, 69.061), best_of_stage={0: 59.0229, 1: 87.3017, 2: 77.8338},
              mbs_of_stage={0: 2, 1: 3, 2: 3}),
    Published(model="GPT2-xl", config=SHIPPED_MODELS["gpt2-xl"], seq_len=1024, dtype="fp16",
              hand=(1, 1, 27.462), tuned=(1, 1, 27.497), best_of_stage={1: 40.1749, 2: 33.0472, 3: 12.8604},
              mbs_of_stage={1: 1, 2: 1, 3: 1}),
    Published(model="DeBERTa-v2-xxlarge", config=_DEBERTA, seq_len=256, dtype="fp16", causal=False,
              hand=(1, 8, 140.587), tuned=(1, 11, 162.395), best_of_stage={1: 177.843, 2: 154.002},
              mbs_of_stage={1: 11, 2: 14}),
)  # fmt: skip

HARDWARE = "16xV100-32GB"


LOGIT_BYTES = 8.0
"""transformers 4.12 took the loss in the model's own precision: logits, their shifted copy, log-softmax, gradient."""

USABLE = 0.96
"""Usable fraction of a GPU's memory; the rest is the CUDA context's, NCCL's for 16 ranks, or lost to fragments."""


def cost_model(row: Published, activation_factor: float = 1.0, constants: StepConstants | None = None) -> CostModel:
    """The model of one row, as the libraries of its time ran it: attention written out, no upcast of the logits."""
    architecture: Architecture = architecture_from_config(row.config, row.model)
    if not row.causal:
        architecture = dataclasses.replace(architecture, vocabulary=3)
    workload = HuggingFaceWorkload(model=row.model, seq_len=row.seq_len, dtype=row.dtype)
    return CostModel(
        workload,
        parse_hardware(HARDWARE),
        architecture=architecture,
        attention="eager",
        memory_constants=MemoryConstants(activation_factor=activation_factor, logit_bytes=LOGIT_BYTES),
        step_constants=constants,
    )


def config_of(stage: int, mbs: int) -> TrialConfig:
    return TrialConfig(zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=1)


def rate(model: CostModel, stage: int, mbs: int) -> float:
    """Predicted samples/s."""
    return model.predict(config_of(stage, mbs)).step.samples_per_second


FACTOR_DEVIATIONS = (0.5, 0.5, 0.7)
"""How far compute, optimizer and ZeRO-2's reduction may be off, as standard deviations of logarithms."""

RATE_DEVIATION, RATIO_DEVIATION = 0.15, 0.05
"""How far formulas with the right factors still are off: between models, and between the stages of one."""


def step_constants(rows: Sequence[Published]) -> StepConstants:
    """Constants under which the rates of these rows, and the ratios between their stages, are most likely.

    ZeRO-3's ratios are left out: its hooks have no factor.
    """
    factor = activation_factor(rows)
    default = StepConstants()

    def constants(logs: npt.NDArray[np.float64]) -> StepConstants:
        compute, optimizer, zero2 = np.exp(logs)
        return dataclasses.replace(
            default,
            efficiency=default.efficiency * compute,
            single_efficiency=default.single_efficiency * compute,
            optimizer_bytes=default.optimizer_bytes * optimizer,
            optimizer_launch_seconds=default.optimizer_launch_seconds * optimizer,
            zero2_owner_seconds=default.zero2_owner_seconds * zero2,
        )

    def residuals(logs: npt.NDArray[np.float64]) -> list[float]:
        found = list(logs / FACTOR_DEVIATIONS)
        for row in rows:
            model = cost_model(row, factor, constants(logs))
            for stage, mbs, measured in {row.hand, row.tuned}:
                found.append(math.log(rate(model, stage, mbs) / measured) / RATE_DEVIATION)
            best = row.best_of_stage
            first = max(best, key=lambda stage: best[stage], default=0)
            for stage in best.keys() - {first, 3}:
                predicted = rate(model, stage, mbs_of(row, model, stage)) / rate(
                    model, first, mbs_of(row, model, first)
                )
                found.append(math.log(predicted / (best[stage] / best[first])) / RATIO_DEVIATION)
        return found

    return constants(least_squares(residuals, np.zeros(len(FACTOR_DEVIATIONS))).x)


def mbs_of(row: Published, model: CostModel, stage: int) -> int:
    """The micro-batch that a stage's best was measured at, as far as it is known."""
    return row.mbs_of_stage.get(stage) or max(largest_fitting(model, stage), 1)


def left_out(row: Published) -> CostModel:
    """The model of one row with all that was fitted to the others alone."""
    others = [other for other in ROWS if other is not row]
    constants = step_constants([other for other in others if other.dtype == row.dtype])
    return cost_model(row, activation_factor(others), constants)


def activation_factor(rows: Sequence[Published]) -> float:
    """The middle of those with which the most of these rows fit at their tuned micro-batch, and not at the next."""

    def right(factor: float) -> int:
        hits = 0
        for row in (row for row in rows if row.ended_at_memory):
            model, (stage, mbs, _) = cost_model(row, factor), row.tuned
            hits += fits(model, stage, mbs) + (not fits(model, stage, mbs + 1))
        return hits

    grid = [1 + step / 50 for step in range(51)]
    most = max(right(factor) for factor in grid)
    return statistics.median([factor for factor in grid if right(factor) == most])


def fits(model: CostModel, stage: int, mbs: int) -> bool:
    peak = model.predict(config_of(stage, mbs)).memory.peak_bytes
    return peak <= USABLE * model.hardware.capacity_bytes


def largest_fitting(model: CostModel, stage: int) -> int:
    """The largest micro-batch predicted to fit."""
    mbs = 0
    while mbs < 1024 and fits(model, stage, mbs + 1):
        mbs += 1
    return mbs


def stage_order(row: Published, model: CostModel) -> list[int]:
    """The stages by their predicted speed, the fastest first."""
    return sorted(row.best_of_stage, key=lambda stage: -rate(model, stage, mbs_of(row, model, stage)))


def main() -> None:
    lines, errors = [], []
    for row in ROWS:
        model = left_out(row)
        stage, hand_mbs, _ = row.hand
        largest = largest_fitting(model, stage)
        doubled = 2 ** int(math.log2(largest)) if largest else 0
        cells = [row.model, row.dtype, f"z{stage}"]
        cells += [f"{hand_mbs} / {doubled}", f"{row.tuned[1]} / {largest}"]
        for config_stage, mbs, measured in (row.hand, row.tuned):
            predicted = rate(model, config_stage, mbs)
            errors.append(predicted / measured - 1)
            cells.append(f"{measured:.1f} / {predicted:.1f} ({errors[-1]:+.0%})")
        published = sorted(row.best_of_stage, key=lambda each: -row.best_of_stage[each])
        cells.append(f"{published} / {stage_order(row, model)}" if published else "–")
        memory = model.predict(config_of(row.tuned[0], row.tuned[1])).memory.peak_bytes / GIB
        cells.append(f"{memory:.1f}")
        lines.append(cells)
    headings = ["model", "dtype", "stage", "hand mbs", "largest mbs", "hand samples/s", "tuned samples/s",
                "order of stages", "GiB at the tuned mbs"]  # fmt: skip
    print("Each cell: published / predicted.\n")
    print(tabulate.tabulate(lines, headings, tablefmt="pipe", disable_numparse=True))
    print(f"\nsamples/s: mean |error| {statistics.fmean(abs(each) for each in errors):.0%}, "
          f"largest {max(abs(each) for each in errors):.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
