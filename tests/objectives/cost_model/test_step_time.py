"""Predicted seconds of a step: what saturates, what is amortised, what takes the most."""

import dataclasses
import itertools
from typing import Any

import pytest

from ds_tune.objectives.cost_model.architecture import Architecture, architecture_from_config
from ds_tune.objectives.cost_model.hardware import CATALOGUE, parse_hardware
from ds_tune.objectives.cost_model.launch_time import CHECKPOINT_SECONDS, ZERO3_GATHER_SECONDS, ZERO3_MATRIX_SECONDS
from ds_tune.objectives.cost_model.step_time import StepEstimate, predict_step
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS

XL: Architecture = architecture_from_config(SHIPPED_MODELS["gpt2-xl"], "gpt2-xl")

WIDE = TrialConfig(zero_stage=0, micro_batch_size=16, gradient_accumulation_steps=8)


def estimate(
    stage: int,
    mbs: int = 1,
    gas: int = 1,
    every: int = 0,
    *,
    on: str = "1xH200",
    dtype: str = "fp16",
    of: Architecture = XL,
) -> StepEstimate:
    config = TrialConfig(
        zero_stage=stage,
        micro_batch_size=mbs,
        gradient_accumulation_steps=gas,
        activation_checkpointing=every,
    )
    return predict_step(config, of, parse_hardware(on), seq_len=1024, dtype=dtype)


@pytest.mark.parametrize("on", ["1xH200", "16xV100-32GB", "2xRTX4090"])
@pytest.mark.parametrize("stage", range(4))
def test_larger_micro_batches_are_faster_with_less_and_less_to_gain(stage: int, on: str) -> None:
    rates = [estimate(stage, 2**power, on=on).samples_per_second for power in range(9)]
    gains = [after / before for before, after in itertools.pairwise(rates)]
    assert all(gain >= 1 for gain in gains)
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.2
    assert gains[-1] < 1.05


def test_no_step_is_faster_than_the_peak_allows() -> None:
    for name, known in CATALOGUE.items():
        for dtype in ("fp16", "fp32"):
            found = estimate(0, 64, on=f"1x{name}", dtype=dtype)
            reached = XL.flops_per_sample(1024) * found.samples_per_second / known.peak_flops(dtype)
            assert 0.1 < reached < 0.8, (name, dtype)


@pytest.mark.parametrize("stage", range(4))
def test_the_smallest_batch_waits_for_the_host_to_launch_kernels(stage: int) -> None:
    one, two = estimate(stage, 1), estimate(stage, 2)
    assert one.bottleneck == "launch"
    # Another sample costs next to nothing there.
    assert one.seconds < two.seconds < 1.25 * one.seconds
    assert estimate(stage, 64).bottleneck == "compute"


def test_zero_3_launches_longest() -> None:
    plain, hooked = estimate(2, 1), estimate(3, 1)
    assert hooked.launch > 2 * plain.launch
    assert hooked.samples_per_second < 0.5 * plain.samples_per_second
    large = estimate(3, 64).samples_per_second / estimate(2, 64).samples_per_second
    assert 0.85 < large < 1


def test_zero_3_launches_longer_the_more_matrices_a_block_has_and_where_there_are_peers() -> None:
    launches = {ranks: [estimate(stage, on=f"{ranks}xH200").launch for stage in (0, 3)] for ranks in (1, 2, 8)}
    alone, of_two, of_eight = (hooked - plain for plain, hooked in launches.values())
    assert alone == pytest.approx(XL.layers * 4 * ZERO3_MATRIX_SECONDS)
    assert of_two - alone == pytest.approx(XL.layers * 4 * ZERO3_GATHER_SECONDS)
    assert of_eight == of_two
    gated = dataclasses.replace(XL, model_type="llama", gated_mlp=True, block_matrices=7)
    assert estimate(3, of=gated).launch - estimate(0).launch == pytest.approx(7 / 4 * alone)


def test_blocks_of_many_small_kernels_launch_longer_unless_they_are_compiled() -> None:
    kinds = (XL, dataclasses.replace(XL, rms_norm=True), dataclasses.replace(XL, relative_columns=512))

    def launches(compile: str) -> list[float]:
        config = TrialConfig(
            zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1, compile=compile
        )  # fmt: skip
        hardware = parse_hardware("1xH200")
        return [predict_step(config, kind, hardware, seq_len=1024, dtype="fp16").launch for kind in kinds]

    plain, llama, deberta = launches("off")
    assert plain < llama < deberta
    assert len(set(launches("blocks"))) == 1


@pytest.mark.parametrize("stage", range(4))
def test_accumulation_pays_the_optimizer_once(stage: int) -> None:
    once, accumulated = estimate(stage, 8, gas=1), estimate(stage, 8, gas=8)
    assert accumulated.optimizer == once.optimizer
    assert accumulated.compute == pytest.approx(8 * once.compute)
    assert accumulated.launch == pytest.approx(8 * once.launch)
    assert accumulated.samples == 8 * once.samples
    assert accumulated.samples_per_second > once.samples_per_second


@pytest.mark.parametrize(
    ("stage", "pays_each_micro_step"), [(0, False), (1, False), (2, True), (3, True)], ids=lambda value: str(value)
)
def test_stages_0_and_1_communicate_once_a_step_and_2_and_3_each_micro_step(
    stage: int, pays_each_micro_step: bool
) -> None:
    once, accumulated = (estimate(stage, 8, gas=gas, on="8xA100-80GB").communication for gas in (1, 8))
    if pays_each_micro_step:
        assert 4 * once < accumulated <= 8 * once
    else:
        assert accumulated == once


@pytest.mark.parametrize("stage", range(4))
def test_one_rank_has_nobody_to_talk_to(stage: int) -> None:
    assert estimate(stage, 8).communication == 0
    assert estimate(stage, 8, on="2xH200").communication > 0


def test_zero_3_moves_half_as_much_again() -> None:
    """Three passes of the parameters over the ring where stages 0 and 1 need two; a part of them is hidden."""
    plain, gathered = (estimate(stage, 8, on="8xA100-80GB").communication for stage in (1, 3))
    assert plain < gathered <= 1.5 * plain


def test_a_slower_link_costs_communication_alone() -> None:
    fast = parse_hardware("8xA100-80GB")
    slow = dataclasses.replace(fast, accelerator=dataclasses.replace(fast.accelerator, link_bandwidth=20e9))
    config = TrialConfig(zero_stage=2, micro_batch_size=8, gradient_accumulation_steps=1)
    one, other = (predict_step(config, XL, hardware, seq_len=1024, dtype="fp16") for hardware in (fast, slow))
    assert other.communication > 5 * one.communication
    assert (other.compute, other.launch, other.optimizer) == (one.compute, one.launch, one.optimizer)


@pytest.mark.parametrize(("every", "factor"), [(1, 4 / 3), (2, 7 / 6), (4, 13 / 12)])
def test_checkpointing_runs_the_blocks_forward_pass_again(every: int, factor: float) -> None:
    blocks = dataclasses.replace(XL, vocabulary=0)
    assert estimate(1, 32, every=every, of=blocks).compute == pytest.approx(factor * estimate(1, 32, of=blocks).compute)
    plain, recomputed = estimate(1, 32), estimate(1, 32, every=every)
    # The projection to the vocabulary is 5% of the FLOPs.
    assert 1 + 0.95 * (factor - 1) < recomputed.compute / plain.compute < factor
    again = CHECKPOINT_SECONDS / every
    assert recomputed.launch == pytest.approx(factor * plain.launch + XL.layers * again)
    assert (recomputed.optimizer, recomputed.communication) == (plain.optimizer, plain.communication)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_share_the_optimizer_step(stage: int) -> None:
    seconds = [estimate(stage, 8, on=f"{ranks}xH200").optimizer for ranks in (1, 2, 8)]
    assert seconds == sorted(seconds, reverse=True)
    assert estimate(0, 8, on="8xH200").optimizer == estimate(0, 8).optimizer


def test_the_samples_are_those_of_all_ranks() -> None:
    found = estimate(1, 4, gas=3, on="16xV100-32GB")
    assert found.samples == 4 * 3 * 16
    assert found.samples_per_second == pytest.approx(4 * 3 * 16 / found.seconds)


def test_fp32_has_a_slower_peak_of_its_own() -> None:
    half, single = (estimate(1, 32, dtype=dtype).samples_per_second for dtype in ("fp16", "fp32"))
    assert single < half / 3


def step(**seconds: float) -> StepEstimate:
    parts = {"compute": 0.1, "launch": 0.1, "communication": 0.1, "optimizer": 0.1, **seconds}
    return StepEstimate(**parts, samples=8)


@pytest.mark.parametrize("part", ["compute", "launch", "communication", "optimizer"])
def test_the_bottleneck_is_named_after_the_longest_part(part: str) -> None:
    assert step(**{part: 1.0}).bottleneck == part


def test_launching_that_hides_behind_compute_is_no_bottleneck() -> None:
    hidden = step(compute=0.5, launch=0.49)
    assert hidden.bottleneck == "compute"
    assert hidden.seconds < 0.5 + 0.49


def test_small_batches_over_slow_links_have_communication_as_bottleneck() -> None:
    assert estimate(3, 1, gas=1, on="8xRTX4090").bottleneck == "communication"


@pytest.mark.parametrize(("compute", "launch"), [(0.01, 0.3), (0.1, 0.1), (0.3, 0.2), (0.5, 0.01)])
def test_the_launch_share_says_how_much_of_a_change_of_launching_the_step_takes_over(
    compute: float, launch: float
) -> None:
    before, after = step(compute=compute, launch=launch), step(compute=compute, launch=launch * 1.001)
    assert (after.seconds / before.seconds - 1) / 0.001 == pytest.approx(before.launch_share, abs=2e-3)
    assert 0 <= before.launch_share <= 1


def with_knobs(stage: int, *, on: str = "1xH200", **knobs: Any) -> StepEstimate:
    config = TrialConfig(zero_stage=stage, micro_batch_size=16, gradient_accumulation_steps=2, **knobs)
    return predict_step(config, XL, parse_hardware(on), seq_len=1024, dtype="fp16")


def test_a_loss_in_chunks_makes_the_logits_twice_and_ligers_does_not() -> None:
    plain, chunked, fused = (with_knobs(1, loss_computation=value) for value in ("default", "chunked", "liger"))
    projection = XL.vocabulary * XL.hidden / XL.parameters
    # The forward pass is a third of all of it.
    assert chunked.compute / plain.compute == pytest.approx(1 + projection / 3)
    assert fused == plain


def test_an_enlarged_vocabulary_is_as_fast_as_a_padded_one() -> None:
    plain, padded, larger = (with_knobs(1, **knobs) for knobs in ({}, {"padded_vocabulary": 64}, {"vocabulary": 64}))
    assert padded == larger
    assert larger.compute < plain.compute


def test_offloaded_parameters_come_over_the_bus_twice_in_each_micro_step() -> None:
    plain, offloaded = (with_knobs(3, offload_parameters=value) for value in ("off", "cpu"))
    assert offloaded.communication - plain.communication == pytest.approx(2 * 2 * 2 * XL.parameters / 40e9)


def test_half_of_the_optimizer_on_the_host_takes_half_of_its_time() -> None:
    off, half, whole = (with_knobs(3, offload_optimizer=value).optimizer for value in ("off", "cpu_half", "cpu"))
    assert half == pytest.approx((off + whole) / 2)


def test_parameter_groups_and_quantized_weights_communicate_less_in_zero_3() -> None:
    plain = with_knobs(3, on="8xH200")
    times = [
        with_knobs(3, on="8xH200", **{field: value}).communication
        for field, value in (("parameter_group", 2), ("quantized_weights", "on"))
    ]
    assert all(0.5 * plain.communication < seconds < plain.communication for seconds in times)
    assert times[1] == pytest.approx(plain.communication * 2 / 3)


def test_deepcompile_has_no_hooks_to_run() -> None:
    assert with_knobs(3, compile="deepcompile").launch < with_knobs(2).launch < with_knobs(3).launch


def test_deepspeeds_timer_is_predicted_to_cost_nothing() -> None:
    """On two H200s 61.7 samples/s without it (61.0 to 62.5), 61.8 with it (60.9 to 62.8)."""
    assert with_knobs(1, throughput_timer="off") == with_knobs(1)


def test_zero_2_pays_for_each_owner_of_gradients_in_each_micro_step() -> None:
    few, many = (with_knobs(2, on=f"{ranks}xH200") for ranks in (2, 16))
    alike = [with_knobs(1, on=f"{ranks}xH200") for ranks in (2, 16)]
    assert many.communication - alike[1].communication > 2 * (few.communication - alike[0].communication)


def test_a_gpu_whose_memory_is_slower_takes_longer_for_what_is_between_its_products() -> None:
    assert CATALOGUE["H100"].peak_flops("fp16") == CATALOGUE["H200"].peak_flops("fp16")
    plain, compiled = (
        {
            gpu: predict_step(config, XL, parse_hardware(f"1x{gpu}"), seq_len=1024, dtype="fp16").compute
            for gpu in ("H100", "H200")
        }
        for config in (WIDE, dataclasses.replace(WIDE, compile="blocks"))
    )
    assert 1.1 < plain["H100"] / plain["H200"] < 1.3
    # Compiling saves traffic.
    assert plain["H100"] / compiled["H100"] > plain["H200"] / compiled["H200"] > 1.1


def test_zero_1_and_2_handle_each_gradient_in_each_micro_step() -> None:
    plain, *hooked = (estimate(stage, 16, gas=4) for stage in range(4))
    assert plain.hooks == hooked[2].hooks == 0
    assert hooked[0].hooks == hooked[1].hooks == pytest.approx(4 * 48 * 0.3e-3)
    assert hooked[0].seconds - hooked[0].hooks == pytest.approx(plain.seconds, rel=0.01)


def test_without_dropout_there_are_no_random_numbers_to_draw() -> None:
    assert with_knobs(0).compute / with_knobs(0, dropout="none").compute > 1.08
