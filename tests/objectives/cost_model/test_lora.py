"""LoRA: most parameters are frozen, have no gradients and no states, and their matrices keep less."""

import csv
import json
from pathlib import Path

import pytest

from ds_tune.objectives.cost_model.architecture import architecture_of
from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts

DATA = Path(__file__).parents[3] / "benchmarks/data/scripts"
TRIALS = list(csv.DictReader((DATA / "1xH200.lora-8b.csv").open()))


@pytest.fixture(scope="module")
def workload() -> ScriptWorkload:
    """The recorded script: an 8B shape with adapters of rank 16 on queries and values."""
    facts = ScriptFacts.from_json(json.loads((DATA / "1xH200.lora-8b.facts.json").read_text()))
    start = ScriptStart(
        program="lora.py", is_module=False, arguments=(), local_rank_flag=None, environment={}, folder="/", launcher=()
    )
    return ScriptWorkload(start=start, facts=facts)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial["name"])
def test_peaks_are_predicted_within_5_percent_and_rates_within_25(
    trial: dict[str, str], workload: ScriptWorkload
) -> None:
    config = TrialConfig(
        zero_stage=int(trial["zero_stage"]),
        micro_batch_size=int(trial["micro_batch_size"]),
        gradient_accumulation_steps=int(trial["gradient_accumulation_steps"]),
        compile=trial["compile"],
    )
    predicted = CostModel(workload, parse_hardware("1xH200-141GB")).predict(config)
    assert predicted.memory.peak_bytes == pytest.approx(float(trial["peak_memory_bytes"]), rel=0.05)
    assert predicted.step.samples_per_second == pytest.approx(float(trial["samples_per_second"]), rel=0.25)


def test_counts_and_flops_are_of_what_is_trained(workload: ScriptWorkload) -> None:
    architecture = architecture_of(workload)
    facts = workload.known
    assert (architecture.parameters, architecture.trained_parameters) == (facts.parameters, facts.trainable_parameters)
    assert architecture.is_frozen
    # No gradients of the frozen weights: two thirds of the matrix products, and the adapters'.
    attention = 12 * 32 * 32 * 128 * 1024
    assert architecture.flops_per_sample(1024) == pytest.approx(1024 * (4 * facts.parameters + attention), rel=1e-3)


def test_states_gradients_and_what_ranks_exchange_are_of_what_is_trained(workload: ScriptWorkload) -> None:
    model = CostModel(workload, parse_hardware("8xH100-80GB"))
    one, three = (
        model.predict(TrialConfig(zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=4))
        for stage in (1, 3)
    )
    trained, all_of_them = model.architecture.trained_parameters, model.architecture.parameters
    assert one.memory.optimizer_states == pytest.approx(12 * trained / 8)
    assert one.memory.gradients == pytest.approx(2 * trained)
    assert one.memory.parameters == pytest.approx(2 * all_of_them)
    assert three.memory.parameters == pytest.approx(2 * all_of_them / 8)
    # ZeRO-3 gathers frozen parameters, too.
    assert three.step.communication > 10 * one.step.communication
