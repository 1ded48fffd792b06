"""Behind the search: the winner has to train what the baseline trains."""

import dataclasses
import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import jsonschema
import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.numerics import LossCurve, NumericsCheck
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.ablations import AgainstWinner, ablated, beside, in_one_session
from ds_tune.tuner.finals import compared

Tune: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

SCHEMA = json.loads((Path(__file__).parents[2] / "tuner" / "reports" / "study.schema.json").read_text())
MACHINE = Machine(device="cuda", name="a GPU", ranks=1, memory_bytes=80 * GIB)
TRAINS = Measurement(
    step_seconds=(1.0, 1.0, 1.0), samples_per_second=1.0, samples_per_second_ci95=(0.99, 1.01), forward_seconds=0.3,
    backward_seconds=0.6, optimizer_seconds=0.1, deepspeed_samples_per_second=None, warmup_step_seconds=(1.0,),
    skipped_steps=0, peak_memory_bytes=GIB, reserved_memory_bytes=GIB, alloc_retries=0, setup_seconds=1.0,
    wall_seconds=5.0, model_parameters=1, flops_per_sample=1.0,
)  # fmt: skip


def config(stage: int, mbs: int, gas: int = 1, **knobs: int | str) -> TrialConfig:
    return TrialConfig(
        zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas, **knobs  # type: ignore[arg-type]
    )  # fmt: skip


def summary(baseline: TrialConfig, *others: TrialConfig, dtype: str = "bf16") -> StudySummary:
    records: Sequence[TrialRecord] = [
        TrialRecord(
            number=number,
            config=each,
            outcome=dataclasses.replace(TRAINS, samples_per_second=1.0 + number),
            source=Source.SEARCH if number else Source.BASELINE,
            started_at="2026-11-24T00:00:00+00:00",
            machine=MACHINE,
            versions={},
        )
        for number, each in enumerate((baseline, *others))
    ]
    workload = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype=dtype)
    return StudySummary(
        study="s", workload=workload, machine=MACHINE, versions={}, trials_total=len(records), tuning_seconds=1.0,
        ended=None, records=records,
    )  # fmt: skip


def names(configs: Sequence[TrialConfig]) -> list[str]:
    return [each.name for each in configs]


def test_the_reference_is_untuned_and_takes_the_same_samples_a_step() -> None:
    winner = config(1, 6, 8, compile="blocks")
    gated, references = compared(winner, summary(config(0, 1), winner))
    assert gated == config(1, 6, 2, compile="blocks")
    assert names(references) == ["z0_gas12_tmbspg1"]


def test_the_reference_is_as_large_as_trials_have_shown_to_fit_and_what_is_smaller_follows() -> None:
    winner = config(3, 8)
    _, references = compared(winner, summary(config(0, 1), config(0, 5), config(0, 8, compile="blocks"), winner))
    assert names(references) == ["z0_gas2_tmbspg4", "z0_gas4_tmbspg2", "z0_gas8_tmbspg1"]


def test_reference_has_the_zero_stage_of_a_partitioned_baseline() -> None:
    winner = config(3, 4)
    _, references = compared(winner, summary(config(2, 1), winner))
    assert names(references) == ["z2_gas4_tmbspg1"]


def test_the_reference_trains_where_the_baseline_loses_its_gradients() -> None:
    winner = config(1, 8, compile="blocks")
    assert names(compared(winner, summary(config(0, 1), winner, dtype="fp16"))[1])[0].startswith("z1_")
    untrained = config(0, 8)
    assert names(compared(untrained, summary(config(0, 1), untrained, dtype="fp16"))[1])[0].startswith("z1_")


def test_larger_batches_alone_are_not_compared() -> None:
    winner = config(0, 8, 4)
    assert compared(winner, summary(config(0, 1), winner))[1] == []


def test_rounded_weights_are_compared_in_the_stage_that_rounds_them() -> None:
    winner = config(3, 1, quantized_weights="on", prefetch_elements=200_000_000)
    _, references = compared(winner, summary(config(0, 1), winner))
    assert names(references) == ["z3_qw-on_gas1_tmbspg1"]


def test_reference_keeps_the_winner_s_allowed_change_of_dropout() -> None:
    winner = config(1, 1, dropout="none", padded_vocabulary=64)
    _, references = compared(winner, summary(config(0, 1), winner))
    assert names(references) == ["z0_dropout-none_gas1_tmbspg1"]


def test_reference_saves_memory_as_the_baseline_does_where_nothing_untuned_fits() -> None:
    saving = {"activation_checkpointing": 1, "offload_optimizer": "cpu"}
    winner = config(1, 6, 21, compile="blocks", offload_optimizer="cpu")
    gated, references = compared(winner, summary(config(1, 1, **saving), winner))
    assert gated == config(1, 6, 2, compile="blocks", offload_optimizer="cpu")
    assert names(references) == ["z1_ac1_offload-cpu_gas12_tmbspg1"]
    assert compared(config(1, 8, **saving), summary(config(1, 1, **saving)))[1] == []


def test_each_setting_is_taken_back_by_itself() -> None:
    winner = config(1, 8, 2, compile="blocks", overlap_comm="on")
    found = ablated(winner, summary(config(0, 1), winner), lambda config: True)
    assert [(field, each.name) for field, each in found] == [
        ("compile", "z1_overlap-on_gas2_tmbspg8"),
        ("overlap_comm", "z1_compile-blocks_gas2_tmbspg8"),
        ("zero_stage", "z0_compile-blocks_overlap-on_gas2_tmbspg8"),
        ("micro_batch_size", "z1_compile-blocks_overlap-on_gas2_tmbspg1"),
        ("gradient_accumulation_steps", "z1_compile-blocks_overlap-on_gas1_tmbspg8"),
    ]
    # ZeRO-0 overlaps nothing, and a fixed global batch leaves no other batch sizes.
    legal = {config(1, 8, 2, overlap_comm="on"), config(1, 8, 2, compile="blocks")}
    assert [field for field, _ in ablated(winner, summary(config(0, 1), winner), legal.__contains__)] == [
        "compile",
        "overlap_comm",
    ]


def test_verified_configurations_are_compared_by_their_verified_rates() -> None:
    study = summary(config(0, 1), config(0, 4), config(0, 8))
    baseline, other, winner = study.records
    runs = {each.config.name: [dataclasses.replace(TRAINS, samples_per_second=rate)] for each, rate in
            ((baseline, 1.05), (winner, 2.9))}  # fmt: skip
    study = dataclasses.replace(study, verification=runs)
    verified = beside(baseline, winner, study)
    assert (verified.samples_per_second, verified.winner_samples_per_second) == pytest.approx((1.05, 2.9))
    # In the search they were 1, 2 and 3.
    searched = beside(other, winner, study)
    assert (searched.samples_per_second, searched.winner_samples_per_second) == pytest.approx((2.0, 3.0))


def test_gain_of_each_setting_is_measured_once_by_ablation_and_reported(tune: Tune, tmp_path: Path) -> None:
    finished = tune("--trials", "9", "--seed", "1", "--json", answer="stage 2 is fastest")
    document = json.loads(finished.stdout)
    found = document["contributions"]
    best = document["best"]
    assert found["winner"] == best["name"]
    by_field = {each["field"]: each for each in found["ablations"]}
    stage = by_field["zero_stage"]
    assert (stage["value"], stage["reason"]) == (0, None)
    # 1.3 times as fast as the formula has it, whose stages cost 4% each.
    gain = best["samples_per_second"] / stage["samples_per_second"] - 1
    assert gain == pytest.approx(1.3 * 0.92 - 1, abs=1e-3)
    words = f"zero_stage 2 rather than 0 brings {gain:.1%} (beside {stage['name']})."
    assert words in finished.stderr
    assert words in (tmp_path / "autotuning_results" / "summary.md").read_text()
    tried = {trial["name"] for trial in document["trials"]}
    launched = {path.name for path in (tmp_path / "autotuning_results" / best["name"] / "ablations").iterdir()}
    # The winner runs once more beside what the study has not tried: their ratio is of one session.
    assert launched == {each["name"] for each in found["ablations"]} - tried | {best["name"]}
    assert json.loads(tune("--trials", "9", "--seed", "1", "--json").stdout)["contributions"] == found


def test_without_verification_nothing_is_explained_by_runs(tune: Tune) -> None:
    document = json.loads(tune("--trials", "3", "--json", "--no-verify").stdout)
    assert document["contributions"] is None
    assert document["numerics"] == []


def test_a_trial_that_trains_something_else_is_not_eligible() -> None:
    study = summary(config(0, 1), config(0, 2), config(1, 2))
    right = LossCurve(losses=(8.0, 7.0), skipped_steps=0)
    wrong = NumericsCheck(
        reference="z0_gas2_tmbspg1", dtype="fp16", curve=LossCurve(losses=(9.0, 8.0), skipped_steps=0),
        reference_curve=right,
    )  # fmt: skip
    study = dataclasses.replace(study, numerics={"z1_gas1_tmbspg2": wrong, "z0_gas1_tmbspg2": "not compared"})
    assert study.best is not None
    assert study.best.config.name == "z0_gas1_tmbspg2"


def test_a_winner_that_trains_as_the_baseline_does_says_so(tune: Tune, tmp_path: Path) -> None:
    finished = tune("--trials", "9", "--seed", "1", "--json", answer="stage 2 is fastest")
    document = json.loads(finished.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["best"]["config"]["zero_stage"] == 2
    [found] = document["numerics"]
    assert (found["name"], found["passed"], found["reason"]) == (document["best"]["name"], True, None)
    assert found["losses"] == found["reference_losses"]
    words = (
        f"{found['name']} trains as untuned training does: over 20 steps from the same seed and data, its losses match "
        f"those of {found['reference']} (largest deviation 1e-06 of the loss change)."
    )
    assert words in finished.stderr
    assert words in (tmp_path / "autotuning_results" / "summary.md").read_text()
    logs = tmp_path / "autotuning_results" / found["name"] / "numerics"
    assert len(list(logs.iterdir())) == 2


def test_the_fastest_is_not_the_winner_if_it_trains_something_else(tune: Tune) -> None:
    finished = tune("--trials", "9", "--seed", "1", "--json", answer="stage 2 is fastest and wrong")
    document = json.loads(finished.stdout)
    jsonschema.validate(document, SCHEMA)
    wrong = [found for found in document["numerics"] if found["passed"] is False]
    assert wrong and all(found["name"].startswith("z2") for found in wrong)
    assert document["best"]["config"]["zero_stage"] != 2
    of_search = [trial for trial in document["trials"] if trial["source"] != "ablation"]
    fastest = max(of_search, key=lambda trial: trial["samples_per_second"])
    assert fastest["name"] in [found["name"] for found in wrong]
    assert f"{fastest['name']} is not the winner, for it trains something else: its first loss is" in finished.stderr


def test_a_comparison_that_cannot_be_made_is_said_and_costs_nobody_the_victory(tune: Tune) -> None:
    finished = tune("--trials", "9", "--seed", "1", "--json", answer="stage 2 is fastest and cannot be compared")
    document = json.loads(finished.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["best"]["config"]["zero_stage"] == 2
    [found] = document["numerics"]
    assert found["passed"] is None
    assert "to compare with, could not be had: rank 1 was killed by SIGSEGV" in found["reason"]
    assert found["reason"] in finished.stderr


def test_killed_after_the_comparison_it_is_not_made_again(tune: Tune) -> None:
    command = ("--trials", "9", "--seed", "1", "--json")
    assert tune(*command, answer="stage 2 is fastest", kill="losses compared:1").returncode != 0
    again = tune(*command, answer="stage 2 is fastest")
    assert "again, in fresh processes" not in again.stderr
    assert json.loads(again.stdout)["numerics"][0]["passed"] is True


def test_ablation_that_beats_the_winner_is_verified_and_wins(tune: Tune) -> None:
    finished = tune("--trials", "4", "--json")
    document = json.loads(finished.stdout)
    jsonschema.validate(document, SCHEMA)
    [found] = [trial for trial in document["trials"] if trial["source"] == "ablation"]
    assert f"{found['name']}, the winner with one setting changed back, is faster" in finished.stderr
    assert document["best"]["name"] == found["name"]
    assert document["best"]["verification_runs"] >= 1
    assert document["contributions"]["winner"] == found["name"], "the new winner is explained"
    assert all(each["samples_per_second"] <= each["winner_samples_per_second"] * 1.01
               for each in document["contributions"]["ablations"])  # fmt: skip
    assert len(document["trials"]) == 5, "the study has its four trials and the finalist"
    again = tune("--trials", "4", "--json")
    assert json.loads(again.stdout)["best"] == document["best"]


@pytest.mark.parametrize("point", ["winner forgotten:1", "finalist begun:1", "saved, not told:5", "told:5"])
def test_killed_while_an_ablation_becomes_a_finalist_it_is_found_and_verified_again(tune: Tune, point: str) -> None:
    expected = json.loads(tune("--trials", "4", "--json", fresh="uninterrupted").stdout)
    assert tune("--trials", "4", kill=point).returncode == -signal.SIGKILL
    finished = tune("--trials", "4", "--json")
    document = json.loads(finished.stdout)
    assert document["best"]["name"] == expected["best"]["name"]
    assert document["best"]["verification_runs"] == expected["best"]["verification_runs"]
    assert [trial["name"] for trial in document["trials"]] == [trial["name"] for trial in expected["trials"]]
    assert "runs again" not in finished.stderr


def test_ablation_becomes_a_finalist_beside_a_configuration_that_somebody_queued(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "4", kill="winner found:1").returncode == -signal.SIGKILL
    store = StudyStore.load(ResultsFolder(tmp_path / "autotuning_results").storage_url, None)
    queued = {"zero_stage": 3, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    store.enqueue(queued, Source.SEARCH)
    document = json.loads(tune("--trials", "4", "--json").stdout)
    [found] = [trial for trial in document["trials"] if trial["source"] == "ablation"]
    assert found["name"] == document["best"]["name"] == "z0_gas1_tmbspg2"
    assert store.has_waiting(), "it is still in the queue"


def measured(rate: float, steps: Sequence[float] = (1.0, 1.0), *, stopped_early: bool = False) -> Measurement:
    return dataclasses.replace(
        TRAINS, samples_per_second=rate, step_seconds=tuple(steps), stopped_early=stopped_early
    )  # fmt: skip


def test_ablation_is_faster_only_beyond_what_two_runs_differ_by() -> None:
    study = summary(config(0, 1), config(0, 4))

    def is_faster(run: Measurement) -> bool:
        return in_one_session(run, measured(100.0), study.records[1], study).is_faster

    assert is_faster(measured(102.0))
    assert not is_faster(measured(100.9))
    assert not is_faster(measured(150.0, stopped_early=True))


def test_ablation_on_a_busy_machine_is_compared_by_its_fastest_steps() -> None:
    study = summary(config(0, 1), config(0, 4))
    uneven = [dataclasses.replace(each, outcome=measured(rate, (1.0, 1.8))) for each, rate in
              zip(study.records, (10.0, 100 / 1.4), strict=True)]  # fmt: skip
    runs = {each.config.name: [each.outcome] for each in uneven}
    study = dataclasses.replace(study, records=uneven, verification=runs)
    winner = study.records[1]

    def against(run: Measurement) -> AgainstWinner:
        return in_one_session(run, measured(70.0, (1.8, 1.8)), winner, study)

    assert not against(measured(100.5)).is_faster, "the winner was disturbed in these processes"
    assert against(measured(80.0, (1.0, 1.8))).is_faster, "it was disturbed itself"
    assert against(measured(80.0)).winner_samples_per_second == pytest.approx(study.rate(winner)), "the printed figure"
