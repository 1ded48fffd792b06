"""Every metric is samples/s in another unit, and is known wherever what it needs is."""

import dataclasses
from pathlib import Path

import pytest

from ds_tune.objectives.cost_model.architecture import architecture_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.metric import METRICS, Metric, MetricContext, all_metrics, check_metric, metric_context
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

CONTEXT = MetricContext(ranks=4, tokens_per_sample=1024, flops_per_sample=1e13, peak_flops=989e12)
WORKLOAD = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
H100 = Machine(
    device="cuda",
    name="NVIDIA H100 80GB HBM3",
    ranks=2,
    device_ids=(0, 1),
    memory_bytes=79 * GIB,
    memory_cap_bytes=None,
    compute_capability="9.0",
)
CPU = dataclasses.replace(H100, device="cpu", name="CPU", device_ids=(), compute_capability=None)
UNKNOWN = dataclasses.replace(H100, name="Accelerator 9000")


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_is_a_positive_multiple_of_samples_per_second(metric: Metric) -> None:
    one = metric.of(1.0, CONTEXT)
    assert one is not None and one > 0
    for rate in (0.01, 3.0, 2500.0):
        assert metric.of(rate, CONTEXT) == pytest.approx(rate * one)
    assert (metric.better, metric.direction) == ("higher", "maximize")


def test_names_and_units_are_unique_and_keys_are_names() -> None:
    assert [metric.name for metric in METRICS.values()] == list(METRICS)
    assert len({metric.unit for metric in METRICS.values()}) == len(METRICS)


RATES = ("samples_per_second", "tokens_per_second", "tokens_per_second_per_gpu")
"""What is known wherever something is trained; of other metrics some may be, too."""


def unknown(**missing: None) -> set[str]:
    values = all_metrics(5.0, dataclasses.replace(CONTEXT, **missing))
    return {name for name, value in values.items() if value is None}


def test_without_a_peak_mfu_is_unknown_and_what_takes_none_is_known() -> None:
    assert "mfu" in unknown(peak_flops=None)
    assert unknown(peak_flops=None).isdisjoint({*RATES, "tflops_per_gpu"})


def test_without_flops_what_counts_them_is_unknown_and_rates_are_known() -> None:
    assert unknown(flops_per_sample=None) >= {"tflops_per_gpu", "mfu"}
    assert unknown(flops_per_sample=None).isdisjoint(RATES)


def test_values_have_the_units_their_names_say() -> None:
    expected = {
        "samples_per_second": 200.0,
        "tokens_per_second": 204_800.0,
        "tokens_per_second_per_gpu": 51_200.0,
        "tflops_per_gpu": 500.0,
        "mfu": 500 / 989,
    }
    values = all_metrics(200.0, CONTEXT)
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_mfu_is_shown_in_percent_and_the_unknown_as_a_dash() -> None:
    assert METRICS["mfu"].words(0.4123) == "41.2%"
    assert METRICS["mfu"].words(None) == "–"


def test_on_a_cpu_a_gpus_share_is_a_ranks() -> None:
    metric = METRICS["tokens_per_second_per_gpu"]
    assert (metric.unit_on("cuda"), metric.unit_on("cpu")) == ("tokens/s a GPU", "tokens/s a rank")


def test_a_known_gpus_peak_is_that_of_the_workloads_precision_and_named() -> None:
    half, single = (metric_context(dataclasses.replace(WORKLOAD, dtype=dtype), H100) for dtype in ("fp16", "fp32"))
    assert (half.peak_flops, half.peak_source) == (989e12, "989 TFLOP/s, data sheet of H100, fp16")
    assert (single.peak_flops, single.peak_source) == (67e12, "67 TFLOP/s, data sheet of H100, fp32")
    assert (half.ranks, half.tokens_per_sample) == (2, 1024)


@pytest.mark.parametrize("machine", [CPU, UNKNOWN], ids=["CPU", "unknown GPU"])
def test_a_machine_outside_the_catalogue_has_no_peak(machine: Machine) -> None:
    context = metric_context(WORKLOAD, machine)
    assert (context.peak_flops, context.peak_source) == (None, "")


def test_measured_flops_count_before_those_of_the_architecture() -> None:
    assert metric_context(WORKLOAD, H100, 2e12).flops_per_sample == 2e12
    assert metric_context(WORKLOAD, H100).flops_per_sample == architecture_of(WORKLOAD).flops_per_sample(1024)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_can_be_asked_for_on_a_known_gpu(name: str) -> None:
    check_metric(name, WORKLOAD, H100)


@pytest.mark.parametrize(
    ("machine", "what"), [(CPU, "a CPU"), (UNKNOWN, "Accelerator 9000")], ids=["CPU", "unknown GPU"]
)
def test_mfu_without_a_peak_is_refused_with_what_to_use_instead(machine: Machine, what: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_metric("mfu", WORKLOAD, machine)
    before, _, instead = str(refused.value).removesuffix("`").partition("; use `metric=")
    assert before == f"`metric=mfu`: the peak FLOP/s of {what} is not known"
    check_metric(instead, WORKLOAD, machine)


def test_flops_of_a_model_without_known_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    workload = dataclasses.replace(WORKLOAD, model=str(tmp_path))
    with pytest.raises(UsageError) as refused:
        check_metric("tflops_per_gpu", workload, H100)
    before, _, instead = str(refused.value).removesuffix("`").partition("; use `metric=")
    assert before.endswith("are not known")
    check_metric(instead, workload, H100)
