"""The cost model against the eight published results of DeepSpeed's autotuner, on one node of 16 V100-32GB.

    python benchmarks/published.py

What is compared: the micro-batch that runs out of memory (the published one fits, what was tried next did not), the
order of the ZeRO stages, and samples/s. Each model is predicted with two factors fitted to the others alone: one of
activation bytes, to all of them, and one of speed, to those of its precision. The sequence lengths are those of the
scripts that go with the results (1024 for GPT-2, 256 for DeBERTa, 128 for the others); the encoders were fine-tuned to
classify, so that they have no logits to speak of. DistilBERT stopped at the script's largest batch, not at memory.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import tabulate

from objectives.cost_model.architecture import Architecture, architecture_from_config
from objectives.cost_model.hardware import parse_hardware
from objectives.cost_model.memory import MemoryConstants
from objectives.cost_model.model import CostModel
from objectives.machine import GIB
from objectives.trial import TrialConfig
from objectives.workload import SHIPPED_MODELS, Workload


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
    """The same of the autotuned run."""
    best_of_stage: dict[int, float]
    """The autotuner's own metric, as far as it printed it: only the order is compared."""
    causal: bool = True


_BERT = {"model_type": "bert"}
_LARGE = {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
          "intermediate_size": 4096}  # fmt: skip
_DEBERTA = {"model_type": "deberta-v2", "num_hidden_layers": 48, "relative_attention": True, "position_buckets": 256,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False, "conv_kernel_size": 3}  # fmt: skip

ROWS = (
    Published(model="DistilBERT", config={"model_type": "distilbert"}, seq_len=128, dtype="fp32", causal=False,
              hand=(0, 256, 5305.067), tuned=(0, 256, 5305.067), best_of_stage={}),
    Published(model="BERT-base", config=_BERT, seq_len=128, dtype="fp32", causal=False,
              hand=(0, 128, 2523.684), tuned=(0, 235, 2736.561),
              best_of_stage={0: 2930.18, 1: 2930.17, 2: 2744.16, 3: 2479.47}),
    Published(model="BERT-large", config=_LARGE, seq_len=128, dtype="fp32", causal=False,
              hand=(1, 64, 766.929), tuned=(1, 93, 808.168), best_of_stage={0: 835.244, 1: 842.243, 2: 764.524}),
    Published(model="GPT2", config=SHIPPED_MODELS["gpt2"], seq_len=1024, dtype="fp16",
              hand=(1, 8, 397.827), tuned=(1, 15, 431.586), best_of_stage={0: 441.693, 1: 452.004}),
    Published(model="GPT2-medium", config=SHIPPED_MODELS["gpt2-medium"], seq_len=1024, dtype="fp16",
              hand=(1, 4, 142.211), tuned=(1, 6, 163.3), best_of_stage={0: 167.688, 1: 175.46, 2: 161.619}),
    Published(model="GPT2-large", config=SHIPPED_MODELS["gpt2-large"], seq_len=1024, dtype="fp16",
              hand=(1, 2, 56.797), tuned=(1, 3, 69.061), best_of_stage={0: 59.0229, 1: 87.3017, 2: 77.8338}),
    Published(model="GPT2-xl", config=SHIPPED_MODELS["gpt2-xl"], seq_len=1024, dtype="fp16",
              hand=(1, 1, 27.462), tuned=(1, 1, 27.497), best_of_stage={1: 40.1749, 2: 33.0472, 3: 12.8604}),
    Published(model="DeBERTa-v2-xxlarge", config=_DEBERTA, seq_len=256, dtype="fp16", causal=False,
              hand=(1, 8, 140.587), tuned=(1, 11, 162.395), best_of_stage={1: 177.843, 2: 154.002}),
)  # fmt: skip

HARDWARE = "16xV100-32GB"


LOGIT_BYTES = 8.0
"""transformers 4.12 took the loss in the model's own precision: logits, their shifted copy, log-softmax, gradient."""

USABLE = 0.96
"""Of a GPU's memory; the rest is the CUDA context's, NCCL's for 16 ranks, or lost to fragments."""


def cost_model(row: Published, activation_factor: float = 1.0) -> CostModel:
    """The model of one row, as the libraries of its time ran it: attention written out, no upcast of the logits."""
    architecture: Architecture = architecture_from_config(row.config, row.model)
    if not row.causal:
        architecture = dataclasses.replace(architecture, vocabulary=3)
    workload = Workload(model=row.model, seq_len=row.seq_len, dtype=row.dtype)
    return CostModel(
        workload,
        parse_hardware(HARDWARE),
        architecture=architecture,
        attention="eager",
        memory_constants=MemoryConstants(activation_factor=activation_factor, logit_bytes=LOGIT_BYTES),
    )


def config_of(stage: int, mbs: int) -> TrialConfig:
    return TrialConfig(zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=1)


def speed_factor(rows: Sequence[Published]) -> float:
    """The one that makes the predictions of these rows right on (geometric) average."""
    found = []
    for row in rows:
        model = cost_model(row)
        for stage, mbs, rate in {row.hand, row.tuned}:
            found.append(math.log(rate / model.predict(config_of(stage, mbs)).step.samples_per_second))
    return math.exp(statistics.fmean(found))


def activation_factor(rows: Sequence[Published]) -> float:
    """The middle of those with which the most of these rows fit at their tuned micro-batch, and not at the next."""

    def right(factor: float) -> int:
        hits = 0
        for row in rows:
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


def stage_order(model: CostModel, stages: Sequence[int]) -> list[int]:
    """The stages by their predicted best speed, each at its largest micro-batch."""
    best = {}
    for stage in stages:
        mbs = largest_fitting(model, stage)
        best[stage] = model.predict(config_of(stage, mbs)).step.samples_per_second if mbs else 0.0
    return sorted(stages, key=lambda stage: -best[stage])


def main() -> None:
    lines, errors = [], []
    for row in ROWS:
        others = [other for other in ROWS if other is not row]
        factor = speed_factor([other for other in others if other.dtype == row.dtype])
        model = cost_model(row, activation_factor([other for other in others if other.model != "DistilBERT"]))
        stage, hand_mbs, _ = row.hand
        largest = largest_fitting(model, stage)
        doubled = 2 ** int(math.log2(largest)) if largest else 0
        cells = [row.model, row.dtype, f"z{stage}"]
        cells += [f"{hand_mbs} / {doubled}", f"{row.tuned[1]} / {largest}"]
        for config_stage, mbs, rate in (row.hand, row.tuned):
            predicted = factor * model.predict(config_of(config_stage, mbs)).step.samples_per_second
            errors.append(predicted / rate - 1)
            cells.append(f"{rate:.1f} / {predicted:.1f} ({errors[-1]:+.0%})")
        published = sorted(row.best_of_stage, key=lambda each: -row.best_of_stage[each])
        predicted_order = stage_order(model, published)
        cells.append(f"{published} / {predicted_order}" if published else "–")
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
