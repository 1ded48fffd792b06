"""`CostModel` fills the formulas in, `Grid` holds them as columns, and the published claims are what they compute."""

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ds_tune.objectives.cost_model.hardware import hardware_of, parse_hardware
from ds_tune.objectives.cost_model.memory import MemoryConstants
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.step_inputs import StepConstants
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "benchmarks" / "data" / "1xH200.gpt2-xl.jsonl"
SCRIPT = ROOT / "benchmarks" / "published.py"
CLAIMS = ROOT / "benchmarks" / "results" / "cost-model.md"

XL = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
GPT2_ROWS = ("GPT2", "GPT2-medium", "GPT2-large", "GPT2-xl")


def config(stage: int, mbs: int = 1, gas: int = 1, every: int = 0) -> TrialConfig:
    return TrialConfig(
        zero_stage=stage,
        micro_batch_size=mbs,
        gradient_accumulation_steps=gas,
        activation_checkpointing=every,
    )


CONFIGS = [
    config(stage, mbs, gas, every)
    for stage in range(4)
    for mbs in (1, 3, 16, 64)
    for gas in (1, 6)
    for every in (0, 1, 2)
]


def test_a_grid_has_the_predictions_as_columns() -> None:
    model = CostModel(XL, parse_hardware("2xH200"))
    grid = model.grid(CONFIGS)
    assert grid.configs == tuple(CONFIGS)
    assert len(grid) == len(CONFIGS)
    for row, each in enumerate(CONFIGS):
        predicted = model.predict(each)
        assert grid.stage[row] == each.zero_stage
        assert 2 ** grid.log2_micro_batch[row] == pytest.approx(each.micro_batch_size)
        assert 2 ** grid.log2_accumulation[row] == pytest.approx(each.gradient_accumulation_steps)
        assert np.exp(grid.log_rate[row]) == pytest.approx(predicted.step.samples_per_second)
        assert grid.peak_bytes[row] == pytest.approx(predicted.memory.peak_bytes)
        assert grid.states_bytes[row] + grid.activation_bytes[row] == pytest.approx(grid.peak_bytes[row])


def test_the_parts_of_a_step_are_shares_of_it() -> None:
    grid = CostModel(XL, parse_hardware("8xA100-80GB")).grid(CONFIGS)
    shares = grid.launch_share + grid.communication_share + grid.optimizer_share
    assert (grid.communication_share > 0).all() and (grid.optimizer_share > 0).all()
    assert (shares < 1).all()


def test_activations_count_only_where_they_are_part_of_the_peak() -> None:
    """The smallest batch peaks in the optimizer step, whose size no sample changes."""
    small, large = CostModel(XL, parse_hardware("1xH200")).grid([config(1, 1), config(1, 32)]).activation_bytes
    assert small == 0
    assert large > 100 * GIB


def test_knobs_are_numbered_by_the_combinations_that_occur() -> None:
    grid = CostModel(XL, parse_hardware("1xH200")).grid(CONFIGS)
    assert list(grid.knobs) == [(0, 1, 2).index(each.activation_checkpointing) for each in CONFIGS]


@pytest.mark.parametrize(
    ("setting", "bucket_bytes"), [({"reduce_bucket_size": 1e8}, 2e8), ({"reduce_bucket_size": "auto"}, 1e9), ({}, 1e9)]
)
def test_the_users_bucket_size_is_taken_from_their_deepspeed_configuration(
    setting: dict[str, object], bucket_bytes: float
) -> None:
    workload = HuggingFaceWorkload(
        model="gpt2-xl", seq_len=1024, dtype="fp16", base_ds_config={"zero_optimization": setting}
    )
    assert CostModel(workload, parse_hardware("2xH200")).predict(config(3)).memory.buckets == bucket_bytes


def test_attention_and_constants_are_the_callers() -> None:
    hardware, of = parse_hardware("1xH200"), config(1, 8)
    usual = CostModel(XL, hardware).predict(of)
    assert CostModel(XL, hardware, attention="eager").predict(of).memory.peak_bytes > usual.memory.peak_bytes
    roomy = CostModel(XL, hardware, memory_constants=MemoryConstants(activation_factor=2.0)).predict(of)
    assert roomy.memory.activations == pytest.approx(2 * usual.memory.activations)
    usually = StepConstants()
    half = StepConstants(
        efficiency=usually.efficiency / 2, traffic=2 * usually.traffic, gap_seconds=2 * usually.gap_seconds
    )
    slow = CostModel(XL, hardware, step_constants=half).predict(of)
    assert slow.step.compute == pytest.approx(2 * usual.step.compute)


def test_two_cpu_ranks_are_predicted_too() -> None:
    machine = Machine(device="cpu", name="AMD EPYC", ranks=2, memory_bytes=8 * GIB)
    model = CostModel(HuggingFaceWorkload(model="gpt2-nano", seq_len=128, dtype="fp32"), hardware_of(machine))
    for stage in range(4):
        found = model.predict(config(stage, 4))
        assert 0.1 * GIB < found.memory.peak_bytes < 2 * GIB
        assert 0.01 < found.step.seconds < 10


def test_a_model_without_sizes_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UsageError, match="models of type resnet have no language-model head"):
        CostModel(HuggingFaceWorkload(model=str(tmp_path), seq_len=128, dtype="fp16"), parse_hardware("1xH200"))


def test_the_uncorrected_seconds_are_as_wrong_as_the_documentation_says() -> None:
    """A prior: close where compute decides, and never off by a factor of two where launching kernels does."""
    surface = read_recording(RECORDED)
    model = CostModel(surface.workload, hardware_of(surface.machine))
    computing, all_errors = [], []
    for of, outcome in surface.outcomes.items():
        if isinstance(outcome, Measurement):
            step = model.predict(of).step
            error = abs(step.samples_per_second / outcome.samples_per_second - 1)
            all_errors.append(error)
            if step.bottleneck == "compute":
                computing.append(error)
    assert np.median(computing) < 0.08
    assert max(all_errors) < 1


@pytest.fixture(scope="module")
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def left_out(published: ModuleType, name: str) -> tuple[Any, CostModel]:
    """(row, model) of one published model, with what was fitted to the others alone."""
    [row] = [row for row in published.ROWS if row.model == name]
    return row, published.left_out(row)


@pytest.mark.parametrize("name", GPT2_ROWS)
def test_the_hand_tuned_micro_batch_of_each_published_gpt2_is_found(published: ModuleType, name: str) -> None:
    """By doubling from 1 until it is out of memory, as it was tuned by hand: 8, 4, 2 and 1."""
    row, model = left_out(published, name)
    stage, by_hand, _ = row.hand
    doubled = 1
    while published.fits(model, stage, 2 * doubled):
        doubled *= 2
    assert doubled == by_hand


@pytest.mark.parametrize("name", GPT2_ROWS)
def test_the_order_of_the_stages_of_published_gpt2s_is_found(published: ModuleType, name: str) -> None:
    row, model = left_out(published, name)
    order = sorted(row.best_of_stage, key=lambda stage: -row.best_of_stage[stage])
    assert published.stage_order(row, model) == order


@pytest.mark.parametrize(
    "name",
    ["DistilBERT", "BERT-base", "BERT-large", *GPT2_ROWS, "DeBERTa-v2-xxlarge"],
)
def test_published_samples_per_second_are_predicted_within_a_quarter(published: ModuleType, name: str) -> None:
    row, model = left_out(published, name)
    for stage, mbs, measured in (row.hand, row.tuned):
        assert published.rate(model, stage, mbs) == pytest.approx(measured, rel=0.25)


def test_the_documentation_shows_what_the_script_computes(
    published: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(text: str) -> list[dict[str, str]]:
        lines = itertools.takewhile(lambda line: line.startswith("|"), text[text.index("\n|") + 1 :].splitlines())
        headings, _, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return [dict(zip(headings, row, strict=True)) for row in cells]

    published.main()
    printed, documented = capsys.readouterr().out, CLAIMS.read_text()
    shown = table(documented[documented.index("benchmarks/published.py") :])
    assert [row["model"] for row in shown] == [row.model for row in published.ROWS]
    for computed, claimed in zip(table(printed), shown, strict=True):
        assert {heading: computed[heading] for heading in claimed} == claimed
    average, largest = re.findall(r"(\d+%)", printed.splitlines()[-1])
    assert f"samples/s: {average} off on average, {largest} at most." in documented
