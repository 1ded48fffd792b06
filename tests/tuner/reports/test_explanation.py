"""Why the best is fast, in sentences."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import Measurement, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.ablations import Ablation, Contributions
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.tuner.reports.explanation import bottleneck_words, explanation_lines, first_steps_words, gain_words

H200 = Machine(device="cuda", name="NVIDIA H200", ranks=2, memory_bytes=139 * GIB, compute_capability="9.0")
WORKLOAD = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")


def measurement(rate: float, samples: int, *, first_steps_seconds: float = 0.0) -> Measurement:
    step = samples / rate
    return Measurement(
        step_seconds=(step,) * 4,
        samples_per_second=rate,
        samples_per_second_ci95=(rate * 0.99, rate * 1.01),
        forward_seconds=0.3 * step,
        backward_seconds=0.6 * step,
        optimizer_seconds=0.1 * step,
        deepspeed_samples_per_second=None,
        warmup_step_seconds=(step + first_steps_seconds,),
        first_steps_seconds=first_steps_seconds,
        skipped_steps=0,
        peak_memory_bytes=60 * GIB,
        reserved_memory_bytes=60 * GIB,
        alloc_retries=0,
        setup_seconds=5.0,
        wall_seconds=10.0,
        model_parameters=1_557_611_200,
        flops_per_sample=1.0e13,
    )


def config(stage: int, mbs: int, gas: int = 1, **knobs: int | str) -> TrialConfig:
    return TrialConfig(
        zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas, **knobs  # type: ignore[arg-type]
    )  # fmt: skip


BASELINE, BEST = config(0, 1), config(1, 16, 2, compile="blocks")


def summary(
    *,
    best: TrialConfig = BEST,
    first_steps_seconds: float = 0.0,
    machine: Machine = H200,
    workload: HuggingFaceWorkload = WORKLOAD,
    **changes: object,
) -> StudySummary:
    records = [
        TrialRecord(
            number=number, config=each, outcome=outcome, source=source, started_at="2026-11-24T00:00:00+00:00",
            machine=machine, versions={},
        )
        for number, (each, outcome, source) in enumerate(
            (
                (BASELINE, measurement(20.0, 2), Source.BASELINE),
                (
                    best,
                    measurement(80.0, best.global_batch_size(2), first_steps_seconds=first_steps_seconds),
                    Source.SEARCH,
                ),
            )
        )
    ]  # fmt: skip
    study = StudySummary(
        study="s", workload=workload, machine=machine, versions={}, trials_total=2, tuning_seconds=60.0, ended=None,
        records=records,
    )  # fmt: skip
    return dataclasses.replace(study, **changes)  # type: ignore[arg-type]


def test_explanation_begins_with_the_largest_part_of_a_step() -> None:
    first = explanation_lines(summary())[0]
    assert first.startswith("Most of a step of z1_compile-blocks_gas2_tmbspg16, about ")
    assert "goes to computing; each GPU does 400 of its 989 TFLOP/s." in first


def test_a_recording_that_tells_no_flops_has_those_of_the_model() -> None:
    study = summary()
    records = [
        dataclasses.replace(record, outcome=dataclasses.replace(record.outcome, flops_per_sample=0.0))  # type: ignore[type-var]
        for record in study.records
    ]
    # 80 samples of 1024 tokens and 10.3 GFLOP each, on two GPUs.
    assert "each GPU does 42" in explanation_lines(dataclasses.replace(study, records=records))[0]


def test_tiny_micro_batches_wait_for_the_host() -> None:
    assert "goes to launching kernels, for which the GPU waits" in explanation_lines(summary(best=config(3, 1, 2)))[0]


def test_without_a_formula_for_the_model_the_rest_is_still_said() -> None:
    contributions = Contributions(winner=BEST.name, ablations=(
        Ablation(
            field="compile", name="z1_gas2_tmbspg16", value="off", samples_per_second=64.0,
            winner_samples_per_second=78.4, reason=None,
        ),
        Ablation(
            field="zero_stage", name="z0_x", value=0, samples_per_second=None, winner_samples_per_second=80.0,
            reason="out of memory",
        ),
    ))  # fmt: skip
    unknown = dataclasses.replace(WORKLOAD, model="/nonesuch")
    lines = explanation_lines(summary(workload=unknown, contributions=contributions))
    assert lines == [
        "compile blocks rather than off brings 22.5% (beside z1_gas2_tmbspg16).",
        "zero_stage 1 rather than 0 makes it run (z0_x: out of memory).",
    ]


def test_explanation_gives_optunas_importance_where_not_every_setting_was_ablated() -> None:
    contributions = Contributions(winner=BEST.name, ablations=(), importances={"micro_batch_size": 0.7, "compile": 0.3})
    lines = explanation_lines(summary(contributions=contributions))
    assert (
        "Not all of it was measured one by one; by Optuna's importance of the trials: micro_batch_size 70%, "
        "compile 30%."
    ) in lines


def test_contributions_to_another_winner_are_left_out() -> None:
    other = Contributions(winner="z0_gas1_tmbspg1", ablations=(), importances={"zero_stage": 1.0})
    assert not any("importance" in line for line in explanation_lines(summary(contributions=other)))


def test_slow_first_steps_pay_off_after_so_many() -> None:
    """64 samples take 3.2 s at 20 a second and 0.8 s at 80: each step makes up for 2.4 of the 29.2 s."""
    assert first_steps_words(summary(first_steps_seconds=29.2)) == (
        "Its first steps take 29 s longer than later ones (compilation), which pays off after 13 steps."
    )
    assert first_steps_words(summary(first_steps_seconds=0.1)) is None


def test_first_steps_of_a_model_that_is_not_compiled_are_not_laid_to_compilation() -> None:
    words = first_steps_words(summary(best=config(1, 16, 2), first_steps_seconds=2.0))
    assert words == "Its first steps take 2 s longer than later ones, which pays off after 1 step."


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (0.225, "brings 22.5%"),
        (-0.046, "costs 4.6%"),
        (0.004, "changes little, +0.4%"),
        (-0.004, "changes little, -0.4%"),
    ],
)
def test_a_setting_that_slows_the_winner_costs_and_one_within_noise_changes_little(gain: float, words: str) -> None:
    assert gain_words(gain) == words


@pytest.mark.parametrize(
    ("gain", "noise", "words"),
    [
        (5.267, 0.25, "brings 530% ± 160%"),
        (0.399, 0.12, "brings 40% ± 17%"),
        (-0.136, 0.02, "costs 13.6% ± 1.7%"),
        (0.136, 0.2, "changes nothing beyond the noise of ± 22%"),
        (-0.129, 0.25, "changes nothing beyond the noise of ± 28%"),
    ],
)
def test_gain_on_a_busy_machine_has_its_uncertainty_and_no_more_digits(gain: float, noise: float, words: str) -> None:
    assert gain_words(gain, noise, disturbed=True) == words


def test_gain_on_a_quiet_machine_below_the_noise_of_two_runs_changes_little() -> None:
    assert gain_words(0.012, 0.014) == "changes little, +1.2%"
    assert gain_words(0.174, 0.014) == "brings 17.4%"


@pytest.mark.parametrize(("verified", "words"), [(True, ""), (False, ", which was not verified")])
def test_setting_that_costs_more_than_the_noise_says_where_that_was_not_verified(verified: bool, words: str) -> None:
    name = "z1_gas2_tmbspg16"
    ablation = Ablation(
        field="compile", name=name, value="off", samples_per_second=90.0, winner_samples_per_second=80.0, reason=None,
        noise=0.014,
    )  # fmt: skip
    study = summary(
        contributions=Contributions(winner=BEST.name, ablations=(ablation,)),
        verification={name: [measurement(90.0, 64)]} if verified else {},
    )
    assert f"compile blocks rather than off costs 11.1% (beside {name}{words})." in explanation_lines(study)


def test_a_share_below_half_is_the_largest_part_and_not_most() -> None:
    """The optimizer's share is measured, and the others share the rest."""
    study = summary(best=config(3, 4))
    best = study.records[1]
    assert isinstance(best.outcome, Measurement)
    step = best.outcome.step_seconds[0]
    slow = dataclasses.replace(best.outcome, optimizer_seconds=0.49 * step)
    model = CostModel(WORKLOAD, hardware_of(H200))
    words = bottleneck_words(best, slow, model)
    assert re.match(r"The largest part of a step of z3_gas1_tmbspg4, about 4\d%, goes to ", words), words


def test_a_compilation_found_in_a_cache_later_still_counts() -> None:
    again = {BEST.name: [measurement(80.0, 64, first_steps_seconds=seconds) for seconds in (29.2, 1.0)]}
    words = first_steps_words(summary(first_steps_seconds=1.0, verification=again))
    assert words is not None and words.startswith("Its first steps take 29 s longer")


def test_numbers_are_advised_where_allowing_them_offers_something() -> None:
    def advised(workload: HuggingFaceWorkload) -> set[str]:
        lines = explanation_lines(summary(workload=workload))
        return {found[1] for line in lines if (found := re.match(r"`allow=numerics:(\w+)` ", line))}

    assert advised(WORKLOAD) == {"dropout", "vocabulary"}
    # A vocabulary that fits its weights is what they were trained for.
    assert advised(dataclasses.replace(WORKLOAD, pretrained=True)) == {"dropout"}


def test_a_vocabulary_that_is_a_multiple_already_is_not_advised_to_grow(tmp_path: Path) -> None:
    fields = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
              "intermediate_size": 8192, "max_position_embeddings": 8192}  # fmt: skip
    advice = []
    for vocabulary in (128256, 128257):
        (tmp_path / "config.json").write_text(json.dumps({**fields, "vocab_size": vocabulary}))
        lines = explanation_lines(
            summary(workload=HuggingFaceWorkload(model=str(tmp_path), seq_len=2048, dtype="bf16"))
        )
        advice.append([line for line in lines if "vocabulary" in line])
    assert (advice[0], len(advice[1])) == ([], 1)


def test_the_next_steps_are_predictions_of_hardware() -> None:
    lines = explanation_lines(summary(best=config(1, 16)))
    assert any(re.match(r"Twice the GPUs are predicted to train [12]\.\d\d times", line) for line in lines), lines
    assert any(line.startswith("Memory is the limit: a micro-batch of 32 is predicted to bring ") for line in lines)


def test_figures_that_nobody_measured_say_so_in_every_sentence() -> None:
    lines = explanation_lines(summary(provenance=Provenance.SIMULATED))
    assert lines and all(line.endswith(", simulated.") or " predicted to " in line for line in lines), lines


def test_a_study_without_a_best_explains_nothing() -> None:
    assert explanation_lines(summary(records=[])) == []
