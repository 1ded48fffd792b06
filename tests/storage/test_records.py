"""What is kept of a trial, and what a study amounts to."""

import dataclasses
import json
from collections.abc import Callable

import pytest

from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.trial import FailureKind, Measurement
from ds_tune.storage.records import RECORD_VERSION, Source, StudyState, StudySummary, TrialRecord, TrialState

MakeRecord = Callable[..., TrialRecord]
MakeSummary = Callable[..., StudySummary]


@pytest.mark.parametrize("samples_per_second", [40.0, None], ids=["measurement", "failure"])
def test_a_record_comes_back_from_json_as_it_was(make_record: MakeRecord, samples_per_second: float | None) -> None:
    record = make_record("z2_gas3_tmbspg5", samples_per_second, number=7, source=Source.RETRY)
    assert TrialRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_record_of_another_version_is_refused(make_record: MakeRecord) -> None:
    document = {**make_record("z0_gas1_tmbspg1", 1.0).to_json(), "version": RECORD_VERSION + 1}
    with pytest.raises(ValueError, match=f"version {RECORD_VERSION + 1}; this ds-tune reads {RECORD_VERSION}"):
        TrialRecord.from_json(document)


@pytest.mark.parametrize(
    ("kind", "state", "counts"),
    [
        (FailureKind.OUT_OF_MEMORY, TrialState.PRUNED, True),
        (FailureKind.CRASH, TrialState.FAILED, False),
        (FailureKind.TIMEOUT, TrialState.FAILED, False),
        (FailureKind.INVALID_CONFIG, TrialState.FAILED, False),
    ],
)
def test_only_out_of_memory_says_something_about_the_configuration(
    make_record: MakeRecord, kind: FailureKind, state: TrialState, counts: bool
) -> None:
    record = make_record("z0_gas1_tmbspg1", kind=kind)
    assert (record.state, record.counts) == (state, counts)


def test_the_reason_names_the_memory_that_was_there(make_record: MakeRecord) -> None:
    assert make_record("z0_gas1_tmbspg1", peak_gib=23.5).reason == "out of memory in forward (peak 23.50 of 24.00 GiB)"
    assert make_record("z0_gas1_tmbspg1", peak_gib=None, message="no room").reason == "out of memory: no room"
    assert make_record("z0_gas1_tmbspg1", kind=FailureKind.TIMEOUT, message="killed").reason == "timeout: killed"
    assert make_record("z0_gas1_tmbspg1", 40.0).reason is None


def test_the_reason_says_from_what_a_slow_trial_was_judged(make_record: MakeRecord) -> None:
    slow = make_record("z3_gas64_tmbspg1", 3.0)
    assert isinstance(slow.outcome, Measurement)
    for micro_steps, seen in ((0, f"{len(slow.outcome.step_seconds)} steps"), (12, "12 micro-steps")):
        stopped = dataclasses.replace(slow.outcome, stopped_early=True, from_micro_steps=micro_steps)
        record = dataclasses.replace(slow, outcome=stopped)
        assert record.reason == f"clearly slower than the best ({seen})"
        assert TrialRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_reason_counts_the_micro_steps_that_a_step_was_put_together_from(make_record: MakeRecord) -> None:
    slow = make_record("z3_gas64_tmbspg1", 3.0)
    assert isinstance(slow.outcome, Measurement)
    parts = StepParts.of([[1.0, 0.9, 0.9, 1.5]] * 2, 64)
    record = dataclasses.replace(slow, outcome=dataclasses.replace(slow.outcome, stopped_early=True, from_parts=parts))
    assert record.reason == "clearly slower than the best (8 micro-steps)"
    assert TrialRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_record_from_before_micro_steps_were_judged_is_read(make_record: MakeRecord) -> None:
    record = make_record("z1_gas2_tmbspg8", 30.0)
    old = record.to_json()
    del old["outcome"]["from_micro_steps"]
    assert TrialRecord.from_json(old) == record


def test_the_best_is_the_fastest_and_the_speedup_has_an_interval(finished: StudySummary) -> None:
    assert finished.best is not None and finished.best.config.name == "z1_gas2_tmbspg8"
    assert finished.baseline is not None and finished.baseline.config.name == "z0_gas1_tmbspg1"
    speedup = finished.speedup
    assert speedup is not None
    assert speedup.factor == pytest.approx(58.25 / 27.5)
    assert speedup.ci95[0] < speedup.factor < speedup.ci95[1]


def test_a_baseline_that_is_the_best_is_one_times_as_fast(make_record: MakeRecord, make_summary: MakeSummary) -> None:
    speedup = make_summary([make_record("z0_gas1_tmbspg1", 30.0, source=Source.BASELINE)]).speedup
    assert speedup is not None and (speedup.factor, speedup.ci95) == (1.0, (1.0, 1.0))


def test_the_baseline_is_the_first_of_the_untuned_configurations_that_ran(
    make_record: MakeRecord, make_summary: MakeSummary
) -> None:
    summary = make_summary(
        [
            make_record("z0_gas1_tmbspg1", source=Source.BASELINE),
            make_record("z1_gas1_tmbspg1", 10.0, source=Source.BASELINE),
            make_record("z2_gas1_tmbspg1", 90.0),
        ]
    )
    assert summary.baseline is not None and summary.baseline.config.name == "z1_gas1_tmbspg1"


def test_without_a_baseline_there_is_no_speedup(make_record: MakeRecord, make_summary: MakeSummary) -> None:
    summary = make_summary([make_record("z1_gas1_tmbspg2", 10.0)])
    assert (summary.baseline, summary.speedup) == (None, None)


def test_a_crash_is_no_finished_trial(finished: StudySummary) -> None:
    assert (len(finished.records), finished.finished_trials) == (5, 4)


def test_study_state_follows_from_its_records_total_and_recorded_end(
    finished: StudySummary, nothing_fits: StudySummary, empty: StudySummary, make_summary: MakeSummary
) -> None:
    assert finished.state is StudyState.FINISHED
    assert nothing_fits.state is StudyState.NOTHING_FITS
    assert empty.state is StudyState.UNFINISHED
    assert make_summary(finished.records, total=5).state is StudyState.UNFINISHED
    assert make_summary(finished.records, total=5, ended="all were tried").state is StudyState.FINISHED


def test_each_stage_has_its_trials_and_its_best(finished: StudySummary) -> None:
    stages = {stage: (count, best and best.config.name) for stage, (count, best) in finished.best_of_stage().items()}
    assert stages == {0: (1, "z0_gas1_tmbspg1"), 1: (2, "z1_gas2_tmbspg8"), 2: (1, None), 3: (1, None)}
