"""The time that is left counts every run that is still to come."""

import itertools

import pytest

from ds_tune.tuner.time_left import (
    ASSUMED_TRIAL_SECONDS,
    EXPLANATION_RUNS,
    FRESH_FACTOR,
    VERIFICATION_RUNS,
    RunsLeft,
)


def test_trials_to_come_take_the_mean_of_those_that_ended() -> None:
    assert RunsLeft(trials=3).seconds(1.0, [4.0, 6.0]) == pytest.approx(14.0)


def test_the_finals_are_part_of_it_from_the_first_trial_on() -> None:
    finals = (FRESH_FACTOR * VERIFICATION_RUNS + EXPLANATION_RUNS) * 5.0
    assert RunsLeft.of_trials(3, finals=True).seconds(0.0, [5.0]) == pytest.approx(15.0 + finals)
    assert RunsLeft.of_trials(3, finals=False).seconds(0.0, [5.0]) == pytest.approx(15.0)


def test_verification_runs_that_ended_tell_what_the_others_take() -> None:
    left = RunsLeft(verifications=2, explanations=1)
    assert left.seconds(0.0, [4.0], [10.0, 20.0]) == pytest.approx(2 * 15.0 + 4.0)


def test_before_a_trial_has_ended_one_is_assumed_and_corrected_while_it_runs() -> None:
    assert RunsLeft(trials=2).seconds(0.0, []) == pytest.approx(2 * ASSUMED_TRIAL_SECONDS)
    assert RunsLeft(trials=2).seconds(100.0, []) == pytest.approx(25.0 + 100.0)


def test_a_run_that_takes_longer_than_the_others_is_never_over_already_and_never_stands_still() -> None:
    left = [RunsLeft(trials=1).seconds(elapsed, [4.0]) for elapsed in (0.0, 1.0, 2.0, 3.0, 4.0, 8.0, 60.0)]
    assert left[:3] == pytest.approx([4.0, 3.0, 2.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(left))
    assert left[-1] > 0
