"""The notes that optuna-dashboard shows."""

import dataclasses
from collections.abc import Callable

import optuna
import optuna_dashboard

from ds_tune.objectives.trial import Measurement, Provenance
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.reports.notes import publish, save_trial_note, study_note, trial_note
from ds_tune.tuner.reports.report import Report

MakeRecord = Callable[..., TrialRecord]
NAMES = ("z1_gas2_tmbspg8", "z1_gas1_tmbspg4")


def verified(finished: StudySummary, make_record: MakeRecord, *, tied: bool) -> StudySummary:
    """The slower of two has won the verification, with the baseline run once."""
    runs: dict[str, list[Measurement]] = {}
    for name, rate in zip((*NAMES, "z0_gas1_tmbspg1"), (52.0, 52.1, 27.0), strict=True):
        outcome = make_record(name, rate).outcome
        assert isinstance(outcome, Measurement)
        runs[name] = [outcome]
    return dataclasses.replace(
        finished, verification=runs, winner=NAMES[1], tied=[NAMES[0]] if tied else []
    )  # fmt: skip


def test_a_trial_has_its_configuration_figure_and_state_in_its_note(make_record: MakeRecord) -> None:
    note = trial_note(make_record("z1_gas2_tmbspg8", 58.25, peak_gib=20.5))
    assert note == "**z1_gas2_tmbspg8**\n\ncomplete\n\n58.25 ± 1.14 samples/s, 20.50 GiB peak a rank"
    note = trial_note(make_record("z1_gas2_tmbspg8", 58.25), provenance=Provenance.SIMULATED)
    assert note.endswith("GiB peak a rank, simulated")


def test_the_winners_note_says_so_with_its_interval_ties_and_optunas_best(
    finished: StudySummary, make_record: MakeRecord
) -> None:
    study = verified(finished, make_record, tied=True)
    fastest, winner = study.records[1:3]
    note = trial_note(winner, study)
    assert note.startswith("**z1_gas1_tmbspg4**: ★ winner\n\nLevel with z1_gas2_tmbspg8: within 2%")
    assert "Optuna's best trial, 1 (z1_gas2_tmbspg8), is the one with the highest figure in the search;" in note
    assert "(1 run) samples/s verified; 40.00 ± 0.79 in the search, 16.00 GiB peak a rank" in note
    assert trial_note(fastest, study).startswith("**z1_gas2_tmbspg8**: level with the winner\n\ncomplete\n\n")
    assert study_note(Report.of(study)).startswith(
        "Trial 2, **z1_gas1_tmbspg4**, is the winner. Level with z1_gas2_tmbspg8: within 2%"
    )
    assert "# gpt2-xl\n" in study_note(Report.of(study))


def test_notes_do_not_mention_optuna_where_its_best_trial_is_the_winner(finished: StudySummary) -> None:
    won = dataclasses.replace(finished, winner=NAMES[0])
    assert "Optuna" not in trial_note(won.records[1], won)
    assert study_note(Report.of(won)).startswith("Trial 1, **z1_gas2_tmbspg8**, is the winner.\n\n# gpt2-xl")


def test_a_fastest_that_lost_the_verification_is_named(finished: StudySummary, make_record: MakeRecord) -> None:
    study = verified(finished, make_record, tied=False)
    assert "z1_gas2_tmbspg8, the fastest of the search, was slower when verified." in study_note(Report.of(study))
    gone = dataclasses.replace(study, verification={})
    assert "z1_gas2_tmbspg8, the fastest of the search, did not run again when verified." in study_note(Report.of(gone))


def test_saving_notes_again_keeps_what_a_person_wrote(finished: StudySummary) -> None:
    study = optuna.create_study(direction="maximize")
    for record in finished.records:
        study.add_trial(optuna.trial.create_trial(value=record.samples_per_second or 0.0))
    publish(study, Report.of(finished))
    trials = [optuna.Trial(study, trial._trial_id) for trial in study.trials]
    assert all(optuna_dashboard.get_note(trial).startswith("**z") for trial in trials)
    optuna_dashboard.save_note(trials[1], "mine")
    publish(study, Report.of(dataclasses.replace(finished, winner=NAMES[1])))
    assert optuna_dashboard.get_note(trials[1]) == "mine"
    assert optuna_dashboard.get_note(trials[2]).startswith("**z1_gas1_tmbspg4**: ★ winner")


def test_failed_trial_has_the_end_of_its_log_in_its_note(finished: StudySummary) -> None:
    study = optuna.create_study()
    for number, record in enumerate(finished.records):
        study.add_trial(optuna.trial.create_trial(value=float(number)))
        save_trial_note(study, record, Provenance.MEASURED)
    note = optuna_dashboard.get_note(optuna.Trial(study, study.trials[3]._trial_id))
    assert note.startswith("**z3_gas1_tmbspg64**\n\npruned: out of memory in forward (peak 24.00 of 24.00 GiB)")
    assert "rank 1 in forward: OutOfMemoryError" in note and "the last lines of the log" in note
