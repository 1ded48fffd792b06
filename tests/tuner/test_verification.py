"""Which of the fastest trials is really the fastest."""

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from objectives.machine import GIB, Machine
from objectives.trial import Measurement, TrialConfig
from objectives.workload import Workload
from storage.records import Source, StudySummary, TrialRecord
from storage.verification import verified_rate
from tuner.verification import MAX_ROUNDS, candidates, judge, next_runs

MACHINE = Machine(device="cpu", name="the test machine", ranks=2, memory_bytes=8 * GIB)


def measurement(rate: float, *, peak_gib: float = 1.0, stopped_early: bool = False) -> Measurement:
    return Measurement(
        step_seconds=(1.0, 1.0),
        samples_per_second=rate,
        samples_per_second_ci95=(rate, rate),
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
        wall_seconds=10.0,
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
        workload=Workload(model="gpt2-nano", seq_len=32, dtype="fp32"),
        machine=MACHINE,
        versions={},
        trials_total=len(rates),
        tuning_seconds=1.0,
        ended=None,
        records=[record(number, measurement(rate)) for number, rate in enumerate(rates)],
        **changes,
    )


def turn(study: StudySummary, runs: Mapping[int, Sequence[float]], failed: frozenset[str] = frozenset()) -> list[int]:
    """The numbers of the trials that run next, given the rates of earlier runs by number."""
    measured = {
        study.records[number].config.name: [measurement(rate) for rate in rates] for number, rates in runs.items()
    }
    return [each.number for each in next_runs(study, measured, failed)]


def test_the_three_fastest_are_candidates_if_they_are_close() -> None:
    assert [each.number for each in candidates(summary(10, 100, 99, 98, 97))] == [1, 2, 3]
    assert [each.number for each in candidates(summary(10, 100, 99, 80))] == [1, 2]


def test_the_two_fastest_are_candidates_however_far_apart() -> None:
    assert [each.number for each in candidates(summary(10, 100, 60, 50))] == [1, 2]


def test_what_was_stopped_early_is_no_candidate() -> None:
    study = summary(10, 100)
    stopped = record(2, measurement(99, stopped_early=True))
    assert [each.number for each in candidates(dataclasses.replace(study, records=[*study.records, stopped]))] == [1, 0]


def test_everybody_runs_once_the_baseline_too() -> None:
    assert turn(summary(10, 100, 99), {}) == [1, 2, 0]


def test_an_interrupted_round_is_finished_first() -> None:
    assert turn(summary(10, 100, 99), {1: [100]}) == [2, 0]


def test_a_settled_order_needs_no_further_run() -> None:
    assert turn(summary(10, 95, 99), {1: [95], 2: [100], 0: [10]}) == []


def test_those_that_are_level_run_again_in_the_other_order() -> None:
    assert turn(summary(10, 100, 99.9, 96), {1: [100], 2: [99.8], 3: [96], 0: [10]}) == [2, 1]


def test_after_its_rounds_a_tie_is_a_tie() -> None:
    runs = {1: [100.0] * MAX_ROUNDS, 2: [100.0] * MAX_ROUNDS, 0: [10.0]}
    assert turn(summary(10, 100, 99), runs) == []


def test_a_single_candidate_runs_once_beside_the_baseline() -> None:
    assert turn(summary(10, 100), {}) == [1, 0]
    assert turn(summary(10, 100), {1: [100], 0: [10]}) == []


def test_a_baseline_that_is_the_fastest_runs_once_beside_the_next() -> None:
    assert turn(summary(100, 10), {}) == [0, 1]


def test_who_fails_in_fresh_processes_is_out() -> None:
    assert turn(summary(10, 100, 99), {2: [99], 0: [10]}, frozenset({"z0_gas1_tmbspg2"})) == []


def test_of_those_that_are_level_the_one_with_the_most_free_memory_wins() -> None:
    rates = {
        name: verified_rate([measurement(rate, peak_gib=peak_gib)], measurement(rate))
        for name, rate, peak_gib in (("large", 100.0, 7), ("small", 99.9, 3), ("slow", 90.0, 1))
    }
    verdict = judge(rates)
    assert (verdict.leader, verdict.tied) == ("small", ("large",))


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
def test_killed_during_the_verification_it_goes_on_where_it_was(tune: Tune, point: str) -> None:
    expected = json.loads(tune("--trials", "4", "--json", fresh="uninterrupted").stdout)
    assert tune("--trials", "4", kill=point).returncode == -signal.SIGKILL
    again = json.loads(tune("--trials", "4", "--json").stdout)
    assert again["best"]["name"] == expected["best"]["name"]
    assert again["best"]["verification_runs"] == expected["best"]["verification_runs"]
