"""What a study's stored records say together: one figure a configuration, who leads, and what is still to be done."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest

from ds_tune.objectives.numerics import LossCurve, NumericsCheck
from ds_tune.objectives.trial import Measurement
from ds_tune.storage.ablations import Contributions
from ds_tune.storage.records import AfterSearch, Source, StudyState, StudySummary, TrialRecord

MakeRecord = Callable[..., TrialRecord]
MakeSummary = Callable[..., StudySummary]

NAMES = ("z0_gas1_tmbspg1", "z0_gas2_tmbspg4", "z1_gas2_tmbspg4")
BURST = (1.0, 1.8, 1.0, 1.8, 1.0)
"""Step times of a run that is disturbed now and then, over those of a quiet machine."""


@pytest.fixture
def busy(make_record: MakeRecord, make_summary: MakeSummary) -> Callable[..., StudySummary]:
    """A study whose runs have these rates by their undisturbed steps; of each configuration the first is the search."""

    def run(name: str, rate: float) -> Measurement:
        outcome = make_record(name, rate / (sum(BURST) / len(BURST))).outcome
        assert isinstance(outcome, Measurement)
        mean = sum(outcome.step_seconds) / len(outcome.step_seconds) / (sum(BURST) / len(BURST))
        return dataclasses.replace(outcome, step_seconds=tuple(mean * each for each in BURST))

    def make(*rates: Sequence[float], **changes: object) -> StudySummary:
        runs = {name: [run(name, rate) for rate in each] for name, each in zip(NAMES, rates, strict=False)}
        records = [
            dataclasses.replace(
                make_record(name, 1.0, number=number, source=Source.SEARCH if number else Source.BASELINE),
                outcome=runs[name][0],
            )
            for number, name in enumerate(NAMES)
        ]
        verification = {name: each[1:] for name, each in runs.items() if each[1:]}
        return make_summary(records, verification=verification, **{"finals_seconds": 60.0, **changes})

    return make


def test_speedup_on_a_busy_machine_is_the_ratio_of_the_verified_figures(busy: Callable[..., StudySummary]) -> None:
    study = busy((66.0, 60.0, 40.0), (400.0, 467.0, 310.0), (300.0, 320.0, 310.0))
    best, baseline, speedup = study.best, study.baseline, study.speedup
    assert study.disturbance is not None
    assert best is not None and baseline is not None and speedup is not None
    assert best.config.name == NAMES[1]
    assert speedup.factor == pytest.approx(study.rate(best) / study.rate(baseline)) == pytest.approx(467 / 66)
    assert speedup.ci95[0] < speedup.factor < speedup.ci95[1]
    for record in (best, baseline):
        verified = study.verified(record)
        assert verified is not None
        low, high = verified.samples_per_second_ci95
        assert low < verified.samples_per_second < high


def test_leader_has_the_highest_figure_and_one_lucky_run_settles_nothing(busy: Callable[..., StudySummary]) -> None:
    study = busy((60.0,) * 7, (500.0, 510.0, 490.0, 505.0, 500.0, 495.0, 660.0), (510.0, 520.0, 515.0) * 2)
    verdict = study.verdict
    assert verdict is not None
    assert (verdict.leader, verdict.level, verdict.unsettled) == (NAMES[1], (), (NAMES[2],))
    leader = next(record for record in study.records if record.config.name == verdict.leader)
    assert study.rate(leader) == max(map(study.rate, study.records)) == pytest.approx(660.0)


def test_configurations_whose_figures_lie_within_their_intervals_are_not_told_apart(
    busy: Callable[..., StudySummary],
) -> None:
    # 183 and 160, each known to about a sixth: neither was shown to be slower.
    study = busy((60.0, 60.0, 61.0), (150.0, 183.0, 120.0), (128.0, 160.0, 155.0))
    verdict = study.verdict
    assert verdict is not None
    assert (verdict.leader, verdict.unsettled) == (NAMES[1], (NAMES[2],))


def test_whoever_ran_and_is_neither_level_nor_unsettled_is_slower_by_more_than_the_intervals(
    busy: Callable[..., StudySummary],
) -> None:
    study = busy((60.0, 62.0, 61.0), (150.0, 152.0, 151.0), (120.0, 121.0, 119.0))
    verdict = study.verdict
    assert verdict is not None
    assert (verdict.leader, verdict.level, verdict.unsettled) == (NAMES[1], (), ())
    low = study.verified(study.records[1])
    high = study.verified(study.records[2])
    assert low is not None and high is not None
    assert low.samples_per_second_ci95[0] > high.samples_per_second_ci95[1]


def test_speedup_whose_interval_spans_a_factor_of_two_is_a_bound(busy: Callable[..., StudySummary]) -> None:
    study = busy((107.0, 52.0, 30.0), (286.0, 150.0, 90.0), (100.0, 80.0, 50.0))
    speedup = study.speedup
    assert speedup is not None
    assert not speedup.settled
    assert speedup.ci95[1] > 2 * speedup.ci95[0]


def test_verified_figure_is_compared_with_none_of_the_search(
    make_record: MakeRecord, make_summary: MakeSummary
) -> None:
    rates = (10.0, 100.0, 99.0)
    records = [
        make_record(name, rate, number=number, source=Source.SEARCH if number else Source.BASELINE)
        for number, (name, rate) in enumerate(zip(NAMES, rates, strict=True))
    ]
    again = {name: [make_record(name, 95.0).outcome] for name in NAMES[1:]}
    study = make_summary(records, verification=again, finals_seconds=20.0)
    assert study.best is records[1]
    assert study.speedup is not None
    assert study.speedup.factor == pytest.approx(10.0), "the baseline did not run again"


@pytest.fixture
def interrupted(make_record: MakeRecord, make_summary: MakeSummary) -> StudySummary:
    """A study that was stopped in its verification: the fastest of the search was slower there."""
    records = [
        make_record(name, rate, number=number, source=Source.SEARCH if number else Source.BASELINE)
        for number, (name, rate) in enumerate(zip(NAMES, (10.0, 100.0, 98.0), strict=True))
    ]
    runs = {name: [make_record(name, rate).outcome] for name, rate in zip(NAMES, (10.0, 93.0, 98.0), strict=True)}
    return make_summary(records, verification=runs, finals_seconds=30.0)


def test_best_of_an_interrupted_verification_is_its_leader_so_far(interrupted: StudySummary) -> None:
    assert interrupted.fastest is interrupted.records[1]
    assert interrupted.best is interrupted.records[2]
    assert interrupted.verdict is not None and interrupted.verdict.leader == NAMES[2]


def test_best_before_all_candidates_ran_again_has_the_highest_figure(interrupted: StudySummary) -> None:
    first = dataclasses.replace(interrupted, verification={NAMES[1]: interrupted.verification[NAMES[1]]})
    assert first.verdict is None
    assert first.best is first.records[2], "98 of the search, where the other has 93 verified"


def test_best_while_more_trials_are_searched_is_the_fastest_of_the_search(interrupted: StudySummary) -> None:
    more = dataclasses.replace(interrupted, trials_total=9)
    assert (more.state, more.best) == (StudyState.UNFINISHED, more.records[1])
    assert more.after_search is AfterSearch.NONE


def test_step_due_after_the_search_follows_from_stored_verification_winner_and_ablations(
    interrupted: StudySummary,
) -> None:
    assert interrupted.state is StudyState.FINISHED
    winner = dataclasses.replace(interrupted, winner=NAMES[2])
    compared = dataclasses.replace(winner, numerics={NAMES[2]: "not compared"})
    earlier = dataclasses.replace(compared, contributions=Contributions(winner=NAMES[1], ablations=()))
    done = dataclasses.replace(compared, contributions=Contributions(winner=NAMES[2], ablations=()))
    unverified = dataclasses.replace(interrupted, verification={}, finals_seconds=None)
    begun = dataclasses.replace(unverified, finals_seconds=0.0)
    assert [each.after_search for each in (interrupted, begun, winner, compared, earlier, done, unverified)] == [
        AfterSearch.VERIFICATION, AfterSearch.VERIFICATION, AfterSearch.VERIFICATION, AfterSearch.ABLATIONS,
        AfterSearch.ABLATIONS, AfterSearch.DONE, AfterSearch.NONE,
    ]  # fmt: skip
    assert [each.goes_on for each in (interrupted, compared, done, unverified)] == [True, True, False, False]


def test_winner_that_trains_something_else_is_not_the_best(interrupted: StudySummary) -> None:
    right = LossCurve(losses=(8.0, 7.0), skipped_steps=0)
    wrong = NumericsCheck(
        reference=NAMES[0], dtype="fp16", curve=dataclasses.replace(right, losses=(9.0, 8.0)), reference_curve=right
    )
    study = dataclasses.replace(interrupted, winner=NAMES[2], numerics={NAMES[2]: wrong})
    assert study.best is study.records[1]


def test_total_counts_what_was_spent_after_the_search(interrupted: StudySummary) -> None:
    runs = sum(run.wall_seconds for each in interrupted.verification.values() for run in each)
    spent = dataclasses.replace(interrupted, finals_seconds=runs + 35.0)
    assert spent.total_seconds == pytest.approx(spent.tuning_seconds + runs + 35.0)
    lost = dataclasses.replace(interrupted, finals_seconds=None)
    assert lost.total_seconds == pytest.approx(lost.tuning_seconds + runs), "as earlier versions stored it"


def test_trial_promoted_by_an_ablation_is_a_candidate(make_record: MakeRecord, make_summary: MakeSummary) -> None:
    names = [f"z0_gas{number}_tmbspg1" for number in range(1, 6)]
    records = [make_record(name, 100.0 - 10 * number) for number, name in enumerate(names)]
    study = make_summary(records)
    assert study.candidates == names[:2]
    assert dataclasses.replace(study, promoted=[names[4]]).candidates == [*names[:2], names[4]]


def test_run_noise_is_known_where_something_ran_again_on_a_busy_machine(busy: Callable[..., StudySummary]) -> None:
    searched = busy((60.0,), (150.0,), (120.0,))
    assert searched.disturbance is not None and searched.run_noise is None
    verified = busy((60.0, 30.0), (150.0, 75.0), (120.0, 60.0))
    assert verified.run_noise == pytest.approx(math.log(2) / math.sqrt(2))
