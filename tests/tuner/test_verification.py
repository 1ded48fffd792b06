"""Which of the fastest trials is really the fastest."""

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import AfterSearch, Source, StudySummary, TrialRecord
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.verification import BUDGET_SECONDS, MAX_ROUNDS, candidates, next_runs, runs_to_follow

MACHINE = Machine(device="cpu", name="the test machine", ranks=2, memory_bytes=8 * GIB)


def measurement(
    rate: float,
    *,
    peak_gib: float = 1.0,
    stopped_early: bool = False,
    half_width: float = 0.0,
    steps: Sequence[float] = (1.0, 1.0),
    wall_seconds: float = 10.0,
) -> Measurement:
    return Measurement(
        step_seconds=tuple(steps),
        samples_per_second=rate,
        samples_per_second_ci95=(rate - half_width, rate + half_width),
        forward_seconds=0.3,
        backward_seconds=0.5,
        optimizer_seconds=0.2,
        deepspeed_samples_per_second=None,
        warmup_step_seconds=(1.0,),
        skipped_steps=0,
        stopped_early=stopped_early,
        peak_memory_bytes=round(peak_gib * GIB),
        reserved_memory_bytes=round(peak_gib * GIB),
        alloc_retries=0,
        setup_seconds=1.0,
        wall_seconds=wall_seconds,
        model_parameters=1000,
        flops_per_sample=1e9,
    )


def record(number: int, outcome: Measurement) -> TrialRecord:
    """Trial 0 is the baseline; the others' names end in their numbers plus one."""
    return TrialRecord(
        number=number,
        config=TrialConfig(zero_stage=0, micro_batch_size=number + 1, gradient_accumulation_steps=1),
        outcome=outcome,
        source=Source.SEARCH if number else Source.BASELINE,
        started_at="2026-01-01T00:00:00+00:00",
        machine=MACHINE,
        versions={},
    )


def summary(*rates: float, **changes: Any) -> StudySummary:
    """A finished study whose trial 0, the baseline, has the first rate."""
    return StudySummary(
        study="test",
        workload=HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32"),
        machine=MACHINE,
        versions={},
        trials_total=len(rates),
        tuning_seconds=1.0,
        ended=None,
        records=[record(number, measurement(rate)) for number, rate in enumerate(rates)],
        **changes,
    )


def verified(study: StudySummary, runs: Mapping[int, Sequence[float]], **changes: Any) -> StudySummary:
    """The study with the rates of earlier runs by number."""
    names = {number: study.records[number].config.name for number in runs}
    measured = {names[number]: [measurement(rate, **changes) for rate in rates] for number, rates in runs.items()}
    return dataclasses.replace(study, verification=measured)


def turn(
    study: StudySummary, runs: Mapping[int, Sequence[float]], failed: frozenset[str] = frozenset(), **changes: Any
) -> list[int]:
    """The numbers of the trials that run next, given the rates of earlier runs by number."""
    return [each.number for each in next_runs(verified(study, runs, **changes), failed)]


def test_the_three_fastest_are_candidates_if_they_are_close() -> None:
    assert [each.number for each in candidates(summary(10, 100, 99, 98, 97))] == [1, 2, 3]
    assert [each.number for each in candidates(summary(10, 100, 99, 80))] == [1, 2]


def test_the_two_fastest_are_candidates_however_far_apart() -> None:
    assert [each.number for each in candidates(summary(10, 100, 60, 50))] == [1, 2]


def test_trial_stopped_early_is_no_candidate_for_verification() -> None:
    study = summary(10, 100)
    stopped = record(2, measurement(99, stopped_early=True))
    assert [each.number for each in candidates(dataclasses.replace(study, records=[*study.records, stopped]))] == [1, 0]


def test_everybody_runs_once_the_baseline_too() -> None:
    assert turn(summary(10, 100, 99), {}) == [1, 2, 0]


def test_an_interrupted_round_is_finished_first() -> None:
    assert turn(summary(10, 100, 99), {1: [100]}) == [2, 0]


def test_a_settled_order_needs_no_further_run() -> None:
    assert turn(summary(10, 95, 99), {1: [95], 2: [100], 0: [10]}) == []


def test_indistinguishable_candidates_are_verified_again_in_reverse_order() -> None:
    assert turn(summary(10, 100, 99.9, 96), {1: [100], 2: [98.7], 3: [96], 0: [10]}) == [2, 1]


def test_candidates_shown_to_be_level_are_not_verified_again() -> None:
    assert turn(summary(10, 100, 99), {1: [100.0], 2: [100.0], 0: [10.0]}) == []


def test_undecided_rounds_go_on_until_the_rounds_or_the_budget_are_spent() -> None:
    study, undecided = summary(10, 100, 99), {1: [95.0, 105.0], 2: [105.0, 95.0], 0: [10.0]}
    assert sorted(turn(study, undecided)) == [1, 2]
    assert turn(study, undecided, wall_seconds=BUDGET_SECONDS) == []
    often = {number: rates * (MAX_ROUNDS // 2) for number, rates in undecided.items()}
    assert turn(study, often, wall_seconds=1.0) == []


def test_second_round_is_always_affordable() -> None:
    assert sorted(turn(summary(10, 100, 99), {1: [95.0], 2: [97.0], 0: [10.0]}, wall_seconds=BUDGET_SECONDS)) == [1, 2]


def test_baseline_runs_again_where_the_speedup_over_it_is_no_answer() -> None:
    study = summary(10, 100, 50)
    assert turn(study, {1: [100.0], 2: [50.0], 0: [10.0]}) == []
    assert turn(study, {1: [100.0], 2: [50.0], 0: [25.0]}) == [0]


BIMODAL = (1.0, 1.8, 1.0, 1.8)


def test_disturbed_machine_has_more_candidates_for_verification() -> None:
    quiet = summary(10, 100, 99, 80, 70, 60, 50)
    busy = dataclasses.replace(
        quiet, records=[record(number, measurement(r.samples_per_second or 0, steps=BIMODAL)) for number, r in
                        enumerate(quiet.records)],
    )  # fmt: skip
    assert [each.number for each in candidates(quiet)] == [1, 2]
    assert busy.disturbance == pytest.approx(0.8)
    assert [each.number for each in candidates(busy)] == [1, 2, 3, 4, 5]


def busy(runs: Mapping[int, Sequence[float]], **changes: Any) -> StudySummary:
    """A study on a busy machine: the undisturbed rates of each trial's runs, of which the first is the search."""
    outcomes = {number: [measurement(rate / 1.4, steps=BIMODAL) for rate in rates] for number, rates in runs.items()}
    study = summary(*(rates[0] for rates in runs.values()))
    records = [record(number, each[0]) for number, each in outcomes.items()]
    names = {each.number: each.config.name for each in records}
    again = {names[number]: each[1:] for number, each in outcomes.items() if each[1:]}
    return dataclasses.replace(study, records=records, verification=again, **changes)


def test_baseline_runs_twice_on_a_busy_machine_also_where_it_is_a_candidate() -> None:
    once = busy({0: [10, 10], 1: [100, 100], 2: [80, 80]})
    assert "z0_gas1_tmbspg1" in once.candidates
    assert [each.number for each in next_runs(once)] == [0]
    twice = busy({0: [10, 10, 10], 1: [100, 100], 2: [80, 80]})
    assert next_runs(twice) == []


def test_whose_figure_is_known_less_runs_again_where_the_speedup_is_no_answer() -> None:
    unsure = busy({0: [10, 10, 10, 10], 1: [100, 40], 2: [30, 30]})
    assert unsure.speedup is not None and not unsure.speedup.settled
    assert 1 in [each.number for each in next_runs(unsure)]
    assert 0 not in [each.number for each in next_runs(unsure)]


def test_configuration_that_was_slow_in_one_round_on_a_busy_machine_runs_again() -> None:
    study = busy({0: [10, 10], 1: [100, 101], 2: [99, 50]})
    assert {1, 2} <= {each.number for each in next_runs(study)}


def test_runs_to_follow_fall_with_each_round_until_the_budget_is_spent() -> None:
    study, undecided = summary(10, 100, 99), {1: [95.0, 105.0], 2: [105.0, 95.0], 0: [10.0]}
    left = []
    for rounds in range(1, MAX_ROUNDS // 2 + 1):
        runs = {number: list(rates) * rounds for number, rates in undecided.items()}
        left.append(runs_to_follow(verified(study, runs, wall_seconds=1.0)))
    assert left == [2 * (MAX_ROUNDS - 3), 2 * (MAX_ROUNDS - 5), 2 * (MAX_ROUNDS - 7), 0]
    assert runs_to_follow(verified(study, undecided, wall_seconds=BUDGET_SECONDS)) == 0
    assert runs_to_follow(study) == 2, "the second round"


def test_configuration_found_by_ablation_is_a_candidate_whatever_its_rate() -> None:
    study = summary(10, 100, 99, 98, 97)
    found = dataclasses.replace(record(5, measurement(60)), source=Source.ABLATION)
    with_found = dataclasses.replace(study, records=[*study.records, found])
    assert [each.number for each in candidates(with_found)] == [1, 2, 3, 5]
    assert with_found.finished_trials == study.finished_trials, "it is none of the trials that were asked for"


def test_a_single_candidate_runs_once_beside_the_baseline() -> None:
    assert turn(summary(10, 100), {}) == [1, 0]
    assert turn(summary(10, 100), {1: [100], 0: [10]}) == []


def test_a_baseline_that_is_the_fastest_runs_once_beside_the_next() -> None:
    assert turn(summary(100, 10), {}) == [0, 1]


def test_candidate_that_failed_in_verification_is_not_run_again() -> None:
    assert turn(summary(10, 100, 99), {2: [99], 0: [10]}, frozenset({"z0_gas1_tmbspg2"})) == []


def judged(*rates_and_peaks: tuple[float, float], half_width: float = 0.0) -> Any:
    """The verdict on trials 1, 2, … of these verified rates and peaks of 8 GiB, as (leader, level, unsettled)."""
    study = summary(10, *(rate for rate, _ in rates_and_peaks))
    runs = {
        study.records[number].config.name: [measurement(rate, peak_gib=peak, half_width=half_width)] * 2
        for number, (rate, peak) in enumerate(rates_and_peaks, start=1)
    }
    verdict = dataclasses.replace(study, verification=runs).verdict_without()
    assert verdict is not None
    numbers = {each.config.name: each.number for each in study.records}
    return numbers[verdict.leader], [numbers[n] for n in verdict.level], [numbers[n] for n in verdict.unsettled]


def test_level_candidate_with_clearly_less_memory_wins() -> None:
    assert judged((100.0, 7), (99.9, 3), (90.0, 1)) == (2, [1], [])


def test_a_few_mib_less_do_not_make_the_slower_one_win() -> None:
    assert judged((100.0, 3), (99.9, 2.99)) == (1, [2], [])


def test_faster_of_indistinguishable_candidates_wins() -> None:
    assert judged((168.0, 4.9), (120.0, 4.6), half_width=80.0) == (1, [], [2])


def test_smaller_of_indistinguishable_candidates_wins_where_memory_is_short() -> None:
    assert judged((101.0, 7.5), (100.0, 4.0), half_width=20.0) == (2, [], [1])


def test_the_winner_is_the_best_and_its_verified_figures_make_the_speedup() -> None:
    names = ["z0_gas1_tmbspg1", "z0_gas1_tmbspg2", "z0_gas1_tmbspg3"]
    runs = {names[0]: [measurement(20)], names[1]: [measurement(80)], names[2]: [measurement(100)]}
    study = summary(10, 100, 99, verification=runs, winner=names[2])
    assert study.best is study.records[2]
    assert study.fastest is study.records[1]
    assert study.speedup is not None
    assert study.speedup.factor == pytest.approx(5.0)


Tune = Callable[..., Any]


def test_a_study_ends_with_its_best_and_its_baseline_run_again(tune: Tune, tmp_path: Any) -> None:
    finished = tune("--trials", "4", "--json")
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    assert document["best"]["verification_runs"] >= 1
    assert document["baseline"]["verification_runs"] >= 1
    low, high = document["best"]["verified_samples_per_second_ci95"]
    assert low < document["best"]["verified_samples_per_second"] < high
    again = tune("--trials", "4", "--json")
    assert json.loads(again.stdout)["best"] == document["best"], "a verified study was verified again"


def test_no_verify_leaves_the_search_s_own_best(tune: Tune) -> None:
    document = json.loads(tune("--trials", "3", "--json", "--no-verify").stdout)
    assert [trial["verification_runs"] for trial in document["trials"]] == [0, 0, 0]


@pytest.mark.parametrize("point", ["verified run stored:1", "verified run stored:2", "winner found:1"])
def test_killed_during_the_verification_it_goes_on_where_it_was(tune: Tune, tmp_path: Path, point: str) -> None:
    expected = json.loads(tune("--trials", "4", "--json", fresh="uninterrupted").stdout)
    assert tune("--trials", "4", kill=point).returncode == -signal.SIGKILL
    stored = StudyStore.load(ResultsFolder(tmp_path / "autotuning_results").storage_url, None).summary()
    assert stored.after_search is AfterSearch.VERIFICATION
    finished = tune("--trials", "4", "--json")
    assert "the search is done (4 trials); verification goes on." in finished.stderr
    assert "is finished" not in finished.stderr
    again = json.loads(finished.stdout)
    assert again["after_search"] == "done"
    assert again["best"]["name"] == expected["best"]["name"]
    assert again["best"]["verification_runs"] == expected["best"]["verification_runs"]
    assert again["total_seconds"] > stored.total_seconds >= stored.tuning_seconds + (stored.finals_seconds or 0.0) > 0


def test_report_of_a_study_killed_in_its_verification_says_that_it_is_incomplete(tune: Tune, command: Tune) -> None:
    assert tune("--trials", "4", kill="verified run stored:2").returncode == -signal.SIGKILL
    told = command("report").stdout
    assert "the search is done (4 trials); verification is incomplete: the same command goes on with it." in told
    assert "is finished" not in told
    assert "★ best so far" in told and "★ winner" not in told
    document = json.loads(command("report", "--json").stdout)
    assert (document["state"], document["after_search"]) == ("finished", "verification")


@pytest.mark.parametrize(
    ("point", "left"),
    [("comparing losses:1", AfterSearch.VERIFICATION), ("losses compared:1", AfterSearch.ABLATIONS)],
)
def test_verdict_outlives_a_kill_after_it(tune: Tune, tmp_path: Path, point: str, left: AfterSearch) -> None:
    command = ("--trials", "9", "--seed", "1", "--json")
    assert tune(*command, answer="stage 2 is fastest", kill=point).returncode == -signal.SIGKILL
    stored = StudyStore.load(ResultsFolder(tmp_path / "autotuning_results").storage_url, None).summary()
    assert stored.best is not None and stored.winner == stored.best.config.name
    assert stored.best.config.zero_stage == 2
    assert stored.after_search is left
    assert stored.finals_seconds is not None and stored.finals_seconds > 0, "stored as it was spent"
    again = tune(*command, answer="stage 2 is fastest")
    assert "again, in fresh processes" not in again.stderr
    document = json.loads(again.stdout)
    assert (document["best"]["name"], document["after_search"]) == (stored.winner, "done")
