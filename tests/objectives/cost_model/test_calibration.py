"""What measurements make of the formulas: right soon where they are nearly right, and survivable where they are wrong.

All of it on a recorded H200, also under memory caps derived from the recorded peaks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ds_tune.objectives.cost_model.calibration import (
    ERROR_PRIORS,
    TIGHT,
    TRIAL_NOISE,
    Observation,
    calibrate_rates,
    observation_of,
)
from ds_tune.objectives.cost_model.grid import Floats, Grid
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.memory_calibration import MemoryPosterior, calibrate_memory
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig

RECORDED = Path(__file__).parents[3] / "benchmarks" / "data" / "1xH200.gpt2-xl.jsonl"
SURFACE: Recording = read_recording(RECORDED)
CONFIGS: tuple[TrialConfig, ...] = tuple(SURFACE.outcomes)
ROW = {config.name: row for row, config in enumerate(CONFIGS)}
CAPACITY = SURFACE.machine.capacity_bytes
GRID: Grid = CostModel(SURFACE.workload, hardware_of(SURFACE.machine)).grid(CONFIGS)

OUT_OF_MEMORY = Failure(kind=FailureKind.OUT_OF_MEMORY, message="CUDA out of memory", phase="forward")

FRAGMENTS = 0.015
"""Of a derived cap, what nothing fits into."""


def measured_rows() -> list[int]:
    return [row for row, config in enumerate(CONFIGS) if isinstance(SURFACE.outcomes[config], Measurement)]


def recorded(row: int) -> Measurement:
    outcome = SURFACE.outcomes[CONFIGS[row]]
    assert isinstance(outcome, Measurement)
    return outcome


def fits(row: int, cap_bytes: float) -> bool:
    outcome = SURFACE.outcomes[CONFIGS[row]]
    return isinstance(outcome, Measurement) and outcome.peak_memory_bytes <= (1 - FRAGMENTS) * cap_bytes


def observed(row: int, cap_bytes: float = CAPACITY) -> Observation:
    """What a trial of a row would have taught under a cap."""
    outcome: Outcome = SURFACE.outcomes[CONFIGS[row]]
    if cap_bytes != CAPACITY and not fits(row, cap_bytes):
        outcome = OUT_OF_MEMORY
    observation = observation_of(row, outcome, cap_bytes)
    assert observation is not None
    return observation


def observed_all(*names: str) -> list[Observation]:
    return [observed(ROW[name]) for name in names]


def scaled(grid: Grid, factor: float) -> Grid:
    """As formulas of memory would have it that are off by a factor."""
    return dataclasses.replace(
        grid,
        states_bytes=factor * grid.states_bytes,
        activation_bytes=factor * grid.activation_bytes,
        peak_bytes=factor * grid.peak_bytes,
    )


def shuffled(grid: Grid, seed: int) -> Grid:
    """As formulas of speed would have it that know nothing."""
    return dataclasses.replace(grid, log_rate=np.random.default_rng(seed).permutation(grid.log_rate))


def memory_errors(memory: MemoryPosterior, but: Sequence[Observation]) -> Floats:
    """Relative errors of the peaks of all recorded configurations but those observed."""
    rest = [row for row in measured_rows() if row not in [each.row for each in but]]
    peaks = np.array([recorded(row).peak_memory_bytes for row in rest])
    return np.abs(memory.mean_bytes[rest] / peaks - 1)


# Memory.


def test_before_any_trial_the_formulas_stand_as_they_are() -> None:
    memory, rates = calibrate_memory(GRID, [], CAPACITY), calibrate_rates(GRID, [])
    assert memory.mean_bytes == pytest.approx(GRID.peak_bytes)
    # The answer that starts from nothing has nothing to say yet.
    speaking = [trust.prior_weight if trust.slope else 0.0 for trust in ERROR_PRIORS]
    assert rates.weights == pytest.approx([weight / sum(speaking) for weight in speaking])
    assert rates.mean == pytest.approx(GRID.log_rate)
    assert rates.means[0] == pytest.approx(GRID.log_rate)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3], ids=["30% too low", "right", "30% too high"])
@pytest.mark.parametrize(
    "names",
    [
        ("z0_gas1_tmbspg1", "z0_gas1_tmbspg16"),
        ("z0_gas1_tmbspg1", "z1_gas1_tmbspg16"),
        ("z0_gas1_tmbspg1", "z0_ac1_gas1_tmbspg64"),
    ],
)
def test_two_trials_at_different_micro_batches_make_all_others_right(names: tuple[str, str], factor: float) -> None:
    """Those of the other stages too, and those with and without checkpointing."""
    trials = observed_all(*names)
    errors = memory_errors(calibrate_memory(scaled(GRID, factor), trials, CAPACITY), but=trials)
    assert np.median(errors) <= 0.03
    assert np.quantile(errors, 0.95) <= 0.10


def test_any_two_trials_leave_formulas_that_are_right_as_right_as_they_were() -> None:
    for seed in range(20):
        trials = [observed(int(row)) for row in np.random.default_rng(seed).choice(measured_rows(), 2, replace=False)]
        errors = memory_errors(calibrate_memory(GRID, trials, CAPACITY), but=trials)
        assert np.median(errors) <= 0.03
        assert np.quantile(errors, 0.95) <= 0.10


def test_a_measured_peak_is_believed_and_says_most_about_its_like() -> None:
    before = calibrate_memory(scaled(GRID, 1.2), [], CAPACITY)
    row, like, unlike = ROW["z1_gas1_tmbspg16"], ROW["z1_gas1_tmbspg12"], ROW["z3_ac1_gas1_tmbspg64"]
    after = calibrate_memory(scaled(GRID, 1.2), [observed(row)], CAPACITY)
    assert after.mean_bytes[row] == pytest.approx(recorded(row).peak_memory_bytes, rel=0.02)
    less = after.deviation_bytes / before.deviation_bytes
    assert less[row] < 0.15
    assert less[row] <= less[like] < less[unlike] < 1


def test_unexpected_out_of_memory_raises_predicted_peaks_of_similar_larger_configurations() -> None:
    cap, surprise = 80 * GIB, ROW["z1_gas1_tmbspg8"]  # predicted to need 59 GiB
    before = calibrate_memory(GRID, [], cap)
    after = calibrate_memory(GRID, [observed(surprise, 60 * GIB)], cap)
    assert before.fits[surprise] > 0.95
    assert after.mean_bytes[surprise] > 0.95 * cap
    assert after.fits[surprise] < 0.3
    for larger in ("z1_gas1_tmbspg12", "z1_gas1_tmbspg16", "z0_gas1_tmbspg12", "z2_gas1_tmbspg12"):
        assert before.mean_bytes[ROW[larger]] < after.mean_bytes[ROW[larger]]
        assert after.fits[ROW[larger]] < 0.5 * before.fits[ROW[larger]]
    # It is one-sided: nothing is thought to need less now, and nothing smaller is given up.
    assert (after.mean_bytes >= before.mean_bytes - 1).all()
    assert after.fits[ROW["z1_gas1_tmbspg1"]] > 0.95
    assert not after.certainly_too_large[ROW["z1_gas1_tmbspg4"]]


def test_the_more_surprising_of_two_failures_teaches_more() -> None:
    cap = 80 * GIB

    def raised(name: str) -> float:
        after = calibrate_memory(GRID, [Observation(row=ROW[name], ran_out=True)], cap)
        return float(after.mean_bytes[ROW[name]] / GRID.peak_bytes[ROW[name]])

    # Predicted to need 98, 78 and 59 GiB.
    assert 1 < raised("z1_gas1_tmbspg16") < raised("z1_gas1_tmbspg12") < raised("z1_gas1_tmbspg8")


@pytest.mark.parametrize("name", ["z0_gas1_tmbspg32", "z0_gas1_tmbspg48", "z3_gas1_tmbspg32"])
def test_expected_out_of_memory_leaves_memory_predictions_unchanged(name: str) -> None:
    cap = 80 * GIB
    before = calibrate_memory(GRID, [], cap)
    after = calibrate_memory(GRID, [observed(ROW[name], cap)], cap)
    assert after.mean_bytes == pytest.approx(before.mean_bytes, rel=1e-3)
    assert after.deviation_bytes == pytest.approx(before.deviation_bytes, rel=1e-2)
    assert after.fits == pytest.approx(before.fits, abs=1e-2)


def test_a_failure_does_not_overrule_what_was_measured() -> None:
    """Near the capacity fragments decide: what ran still fits."""
    cap = 80 * GIB
    trials = [
        *observed_all("z0_gas1_tmbspg8", "z2_gas1_tmbspg12"),
        Observation(row=ROW["z3_gas1_tmbspg12"], ran_out=True),
    ]
    memory = calibrate_memory(GRID, trials, cap)
    for each in trials[:2]:
        assert memory.mean_bytes[each.row] == pytest.approx(recorded(each.row).peak_memory_bytes, rel=0.02)
    assert memory.fits[ROW["z3_gas1_tmbspg12"]] < 0.3


def test_memory_outside_tensors_lowers_odds_of_fitting_but_makes_nothing_certain_not_to_fit() -> None:
    cap = 80 * GIB
    whole, less = calibrate_memory(GRID, [], cap), calibrate_memory(GRID, [], cap, outside_bytes=2.5 * GIB)
    near = [row for row in range(len(GRID)) if 0.92 * cap < GRID.peak_bytes[row] < cap]
    assert near
    assert all(less.fits[row] < whole.fits[row] - 0.05 for row in near)
    assert (less.certainly_too_large == whole.certainly_too_large).all()


CAPS = [24, 32, 36, 40, 60, 80, None]


@pytest.mark.parametrize("factor", [1.0, 0.7, 1.3], ids=["formulas right", "30% too low", "30% too high"])
@pytest.mark.parametrize("cap_gib", CAPS)
def test_nothing_that_fits_is_ever_certain_not_to(cap_gib: int | None, factor: float) -> None:
    """Before any trial, and after any of the first five of 20 random searches."""
    cap = CAPACITY if cap_gib is None else cap_gib * GIB
    fitting = [row for row in range(len(CONFIGS)) if fits(row, cap)]
    grid = scaled(GRID, factor)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(CONFIGS))[:5]
        trials = [observed(int(row), cap) for row in order]
        for count in range(6):
            given_up = calibrate_memory(grid, trials[:count], cap).certainly_too_large
            assert not [CONFIGS[row].name for row in fitting if given_up[row]], (seed, count)


def test_after_two_trials_what_is_far_too_large_is_certain_and_the_edge_is_not() -> None:
    memory = calibrate_memory(GRID, observed_all("z0_gas1_tmbspg1", "z0_gas1_tmbspg16"), CAPACITY)
    for config, given_up in zip(CONFIGS, memory.certainly_too_large, strict=True):
        if isinstance(SURFACE.outcomes[config], Failure):
            assert given_up == (config.micro_batch_size >= 32), config.name
    # It fits, with 2.6% to spare; the same micro-batch in stages 1 to 3 does not.
    assert not memory.certainly_too_large[ROW["z0_gas1_tmbspg24"]]


# Speed.


@pytest.mark.parametrize("seed", range(5))
def test_formulas_that_explain_the_measurements_are_trusted_more(seed: int) -> None:
    rows = np.random.default_rng(seed).choice(measured_rows(), 9, replace=False)
    trials = [observed(int(row)) for row in rows]
    assert calibrate_rates(GRID, trials).weights[0] > 0.9


def test_formulas_that_do_not_are_given_up_for_the_answer_without_them() -> None:
    assert ERROR_PRIORS[-1].slope == 0
    weights: dict[int, list[float]] = {1: [], 5: [], 9: []}
    for seed in range(20):
        rows = np.random.default_rng(seed).choice(measured_rows(), 9, replace=False)
        trials = [observed(int(row)) for row in rows]
        for count, found in weights.items():
            found.append(float(calibrate_rates(shuffled(GRID, seed), trials[:count]).weights[-1]))
    means = [float(np.mean(found)) for found in weights.values()]
    assert means == sorted(means)
    assert means[-1] > 0.95


def test_without_the_formulas_predictions_are_about_what_was_measured() -> None:
    trials = observed_all("z0_gas1_tmbspg8", "z0_gas1_tmbspg16", "z2_gas1_tmbspg12")
    without = calibrate_rates(shuffled(GRID, 0), trials).means[-1]
    rates = [recorded(each.row).samples_per_second for each in trials]
    assert np.exp(without[ROW["z1_gas1_tmbspg12"]]) == pytest.approx(np.mean(rates), rel=0.15)


def test_a_common_factor_is_learned_from_one_trial() -> None:
    """Another machine of the same kind, half as fast."""
    row = ROW["z1_gas1_tmbspg16"]
    slower = Observation(row=row, log_rate=float(GRID.log_rate[row]) - math.log(2), relative_error=0.005)
    rates = calibrate_rates(GRID, [slower])
    others = [row for row in measured_rows() if GRID.launch_share[row] < 0.1]
    assert np.exp(rates.mean - GRID.log_rate)[others] == pytest.approx(0.5, rel=0.15)


def test_measured_rates_are_predicted_to_within_their_noise() -> None:
    names = ("z0_gas1_tmbspg1", "z0_gas1_tmbspg16", "z3_gas1_tmbspg8", "z1_ac1_gas1_tmbspg2", "z0_gas4_tmbspg2")
    trials = observed_all(*names)
    rates = calibrate_rates(GRID, trials)
    for each in trials:
        noise = math.hypot(TRIAL_NOISE, each.relative_error)
        assert rates.mean[each.row] == pytest.approx(each.log_rate, abs=2 * noise)
        assert rates.deviation[each.row] < 2 * noise


@pytest.mark.parametrize("count", [0, 2, 4, 6, 9])
def test_intervals_hold_what_is_then_measured(count: int) -> None:
    """95% intervals of what was not tried, over 20 random searches."""
    held = []
    for seed in range(20):
        order = [int(row) for row in np.random.default_rng(seed).permutation(measured_rows())]
        rates = calibrate_rates(GRID, [observed(row) for row in order[:count]])
        actual = np.log([recorded(row).samples_per_second for row in order[count:]])
        within = np.abs(actual - rates.mean[order[count:]]) < 1.96 * rates.deviation[order[count:]]
        held.append(within.mean())
    assert np.mean(held) > 0.85


def test_a_run_that_was_tight_on_memory_says_little_about_others() -> None:
    """At 97% of the memory an allocator that searches for room cost a tenth of the speed. Of that run it is true."""
    row, untouched = ROW["z0_gas1_tmbspg24"], observed_all("z0_gas1_tmbspg1", "z0_gas1_tmbspg8")
    outcome = recorded(row)
    assert outcome.peak_memory_bytes > TIGHT * CAPACITY
    tight = observation_of(row, outcome, CAPACITY)
    roomy = observation_of(row, outcome, 2 * CAPACITY)  # as if there had been plenty
    assert tight is not None and roomy is not None
    assert tight.log_rate == roomy.log_rate == pytest.approx(math.log(outcome.samples_per_second))
    before = calibrate_rates(GRID, untouched).mean
    moved = [
        float(np.abs(np.delete(np.expm1(calibrate_rates(GRID, [*untouched, each]).mean - before), row)).max())
        for each in (tight, roomy)
    ]
    assert moved[0] < 0.04
    assert moved[0] < moved[1] / 3


# What an outcome teaches.


def test_a_measurement_teaches_a_rate_with_its_error_and_a_peak() -> None:
    row = ROW["z0_gas1_tmbspg8"]
    outcome = dataclasses.replace(recorded(row), samples_per_second=20.0, samples_per_second_ci95=(19.0, 21.0))
    found = observation_of(row, outcome, CAPACITY)
    assert found is not None
    assert found.log_rate == pytest.approx(math.log(20))
    assert found.relative_error == pytest.approx(0.05 / 1.96)
    assert (found.peak_bytes, found.ran_out) == (outcome.peak_memory_bytes, False)


def test_a_wider_interval_moves_the_others_less() -> None:
    row = ROW["z0_gas1_tmbspg8"]
    moved = []
    for width in (0.01, 0.3):
        rate = recorded(row).samples_per_second * 1.5
        outcome = dataclasses.replace(
            recorded(row),
            samples_per_second=rate,
            samples_per_second_ci95=(rate * (1 - width), rate * (1 + width)),
        )
        trial = observation_of(row, outcome, CAPACITY)
        assert trial is not None
        rates = calibrate_rates(GRID, [*observed_all("z0_gas1_tmbspg12"), trial])
        moved.append(rates.mean[ROW["z0_gas1_tmbspg4"]])
    assert moved[0] > moved[1]


def test_running_out_of_memory_teaches_only_that() -> None:
    found = observation_of(3, OUT_OF_MEMORY, CAPACITY)
    assert found == Observation(row=3, ran_out=True)
    assert calibrate_rates(GRID, [found]).mean == pytest.approx(calibrate_rates(GRID, []).mean)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.OUT_OF_MEMORY])
def test_a_trial_that_crashed_or_hung_teaches_nothing(kind: FailureKind) -> None:
    crashed = Failure(kind=kind, message="rank 1 was killed by SIGSEGV", phase="forward", peak_memory_bytes=GIB)
    assert observation_of(3, crashed, CAPACITY) is None


def test_a_trial_given_up_within_its_first_step_teaches_its_speed_and_no_peak() -> None:
    """It never came to the optimizer step, which may need more than it had."""
    row = ROW["z0_gas1_tmbspg1"]
    outcome = dataclasses.replace(recorded(row), stopped_early=True, from_micro_steps=14)
    found = observation_of(row, outcome, CAPACITY)
    assert found is not None
    assert found.peak_bytes is None
    assert found.log_rate == pytest.approx(math.log(outcome.samples_per_second))
    memory = calibrate_memory(GRID, [found], CAPACITY)
    assert memory.mean_bytes == pytest.approx(GRID.peak_bytes)


def test_a_trial_that_was_stopped_early_between_steps_teaches_both() -> None:
    row = ROW["z3_gas1_tmbspg1"]
    found = observation_of(row, dataclasses.replace(recorded(row), stopped_early=True), CAPACITY)
    assert found is not None
    assert found.log_rate is not None and found.peak_bytes is not None


@pytest.mark.parametrize("calibrate", [lambda trials: calibrate_rates(GRID, trials).mean,
                                       lambda trials: calibrate_memory(GRID, trials, CAPACITY).mean_bytes],
                         ids=["speed", "memory"])  # fmt: skip
def test_the_order_of_measurements_does_not_matter(calibrate: Callable[[Sequence[Observation]], Floats]) -> None:
    trials = [observed(row) for row in measured_rows()[::7]]
    assert calibrate(trials) == pytest.approx(calibrate(trials[::-1]), rel=1e-6)


def test_many_measurements_of_one_configuration_are_no_trouble() -> None:
    trials = observed_all("z0_gas1_tmbspg8") * 50
    assert np.isfinite(calibrate_rates(GRID, trials).mean).all()
    memory = calibrate_memory(GRID, trials, CAPACITY)
    assert np.isfinite(memory.mean_bytes).all() and (memory.deviation_bytes > 0).all()


def test_running_out_of_memory_far_from_the_limit_teaches_the_most() -> None:
    """However sure the formulas were, what ran out of memory is believed not to fit."""
    row = ROW["z1_gas1_tmbspg8"]
    known = observed_all("z0_gas1_tmbspg1", "z0_gas1_tmbspg8", "z1_gas1_tmbspg12")
    before = calibrate_memory(GRID, known, 80 * GIB)
    after = calibrate_memory(GRID, [*known, Observation(row=row, ran_out=True)], 80 * GIB)
    assert before.fits[row] > 0.99
    assert after.mean_bytes[row] > before.mean_bytes[row] + GIB
