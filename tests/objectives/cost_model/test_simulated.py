"""A simulated machine: repeatable, never quite what the formulas say, and as short of memory as a real one."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.cost_model.hardware import machine_of, parse_hardware
from ds_tune.objectives.cost_model.model import CostModel, Prediction
from ds_tune.objectives.cost_model.simulated import SimulatedObjective
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.objective import Objective
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

WORKLOAD = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
SEEDS = range(20)


def config(stage: int, mbs: int, gas: int = 1) -> TrialConfig:
    return TrialConfig(zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas)


FITTING = [config(stage, mbs, gas) for stage in range(4) for mbs in (1, 2, 4) for gas in (1, 8)]
"""Far below the memory of `BIG`, so that all of them have rates."""
BIG = "2xH200"


class Simulation:
    """One simulated machine, and what the formulas say of it."""

    def __init__(self, hardware: str, seed: int = 0, *, cap_gib: int | None = None, plan: StepPlan | None = None):
        known = parse_hardware(hardware, memory_cap_bytes=cap_gib and cap_gib * GIB)
        self.model = CostModel(WORKLOAD, known)
        self.machine = machine_of(known)
        self.objective: Objective = SimulatedObjective(self.model, self.machine, seed, plan)

    def run(self, config: TrialConfig, *, best: float | None = None) -> Outcome:
        return self.objective.run(config, Path("nowhere"), lambda phase: None, best_samples_per_second=best)

    def measure(self, config: TrialConfig, *, best: float | None = None) -> Measurement:
        outcome = self.run(config, best=best)
        assert isinstance(outcome, Measurement)
        return outcome

    def predict(self, config: TrialConfig) -> Prediction:
        return self.model.predict(config)

    def slower(self, config: TrialConfig) -> float:
        """The logarithm of its mean step over the predicted one."""
        return math.log(statistics.fmean(self.measure(config).step_seconds) / self.predict(config).step.seconds)

    def larger(self, config: TrialConfig) -> float:
        """The logarithm of its peak over the predicted one."""
        return math.log(self.measure(config).peak_memory_bytes / self.predict(config).memory.peak_bytes)


def test_its_figures_are_simulated_and_nothing_is_run(tmp_path: Path) -> None:
    simulation = Simulation(BIG)
    phases: list[str] = []
    simulation.objective.prepare()
    simulation.objective.run(config(1, 1), tmp_path, phases.append)
    simulation.objective.close()
    assert simulation.objective.provenance is Provenance.SIMULATED
    assert phases == [] and list(tmp_path.iterdir()) == []


def test_one_seed_is_one_machine_in_whatever_order_it_is_asked() -> None:
    forwards, backwards = Simulation(BIG, 3), Simulation(BIG, 3)
    first = {each.name: forwards.run(each) for each in FITTING}
    second = {each.name: backwards.run(each) for each in reversed(FITTING)}
    assert first == second
    assert {each.name: forwards.run(each) for each in FITTING} == first


def other_seed() -> Simulation:
    return Simulation(BIG, 4)


def other_hardware() -> Simulation:
    return Simulation("4xH200", 3)


@pytest.mark.parametrize("other", [other_seed, other_hardware])
def test_another_seed_or_another_hardware_is_another_machine(other: Callable[[], Simulation]) -> None:
    one, another = Simulation(BIG, 3), other()
    assert all(one.slower(each) != another.slower(each) for each in FITTING)
    assert all(one.larger(each) != another.larger(each) for each in FITTING)


def test_a_cap_leaves_the_rest_of_the_machine_as_it_is() -> None:
    whole, capped = Simulation(BIG, 3), Simulation(BIG, 3, cap_gib=100)
    assert [whole.measure(each).step_seconds for each in FITTING] == [
        capped.measure(each).step_seconds for each in FITTING
    ]


def test_steps_deviate_from_the_formulas_but_not_without_bounds() -> None:
    deviations = {seed: [Simulation(BIG, seed).slower(each) for each in FITTING] for seed in SEEDS}
    everywhere = [deviation for machine in deviations.values() for deviation in machine]
    assert all(0 < abs(deviation) < 0.5 for deviation in everywhere)
    # A search that reads the optimum off the formulas would be some percent wrong, and no machine is another's.
    assert 0.05 < statistics.stdev(statistics.fmean(machine) for machine in deviations.values()) < 0.2
    assert abs(statistics.fmean(everywhere)) < 0.1


def test_on_one_machine_stages_deviate_by_more_than_the_configurations_of_a_stage() -> None:
    among_stages, within = [], []
    for seed in SEEDS:
        simulation = Simulation(BIG, seed)
        stages = [[simulation.slower(each) for each in FITTING if each.zero_stage == stage] for stage in range(4)]
        among_stages.append(statistics.stdev(statistics.fmean(stage) for stage in stages))
        within += [statistics.stdev(stage) for stage in stages]
    assert 0.005 < statistics.fmean(within) < 0.04
    assert statistics.fmean(within) < statistics.fmean(among_stages) < 0.1


def test_peaks_deviate_from_the_formulas_but_not_without_bounds() -> None:
    deviations = [Simulation(BIG, seed).larger(each) for seed in SEEDS for each in FITTING]
    assert all(0 < abs(deviation) < 0.12 for deviation in deviations)
    assert 0.005 < statistics.stdev(deviations) < 0.04


@pytest.mark.parametrize(
    ("hardware", "cap_gib"), [("16xV100-32GB", None), ("1xH200", None), ("2xH200", 80), ("8xA100-40GB", 24)]
)
def test_simulated_run_above_the_usable_memory_runs_out_of_memory(hardware: str, cap_gib: int | None) -> None:
    seen = set()
    for seed in SEEDS:
        simulation = Simulation(hardware, seed, cap_gib=cap_gib)
        capacity = simulation.machine.capacity_bytes
        for each in (config(stage, mbs) for stage in range(4) for mbs in (1, 2, 3, 5, 8, 13, 21, 34)):
            outcome, predicted = simulation.run(each), simulation.predict(each).memory.peak_bytes
            seen.add(type(outcome))
            if isinstance(outcome, Measurement):
                # An allocator cannot use the last percent of its capacity.
                assert outcome.peak_memory_bytes <= 0.99 * capacity
                assert outcome.peak_memory_bytes <= outcome.reserved_memory_bytes <= capacity
                assert predicted < 1.1 * capacity
            else:
                assert predicted > 0.85 * capacity
    assert seen == {Measurement, Failure}


def test_running_out_of_memory_says_where_and_how_much_there_was() -> None:
    simulation = Simulation("16xV100-32GB")
    cases = {"step": config(0, 1), "backward": config(2, 16)}
    for phase, each in cases.items():
        outcome = simulation.run(each)
        assert isinstance(outcome, Failure)
        assert (outcome.kind, outcome.phase) == (FailureKind.OUT_OF_MEMORY, phase)
        assert "simulated" in outcome.message
        assert outcome.peak_memory_bytes is not None
        # Of 31.7 GiB, 5% are no tensor's; of the rest a share of the large tensors is lost to fragments.
        lost = 0.95 * simulation.machine.capacity_bytes - outcome.peak_memory_bytes
        large_bytes = simulation.model.predict(each).memory.large_bytes
        assert 0.1 <= lost / large_bytes <= 1.2
        assert outcome.wall_seconds > 0


def test_a_configuration_that_is_clearly_slower_is_stopped_early() -> None:
    simulation = Simulation(BIG)
    slow, fast = config(3, 1), config(1, 16)
    best = simulation.measure(fast).samples_per_second
    whole, stopped = simulation.measure(slow), simulation.measure(slow, best=best)
    assert best > 2 * whole.samples_per_second
    assert not whole.stopped_early and stopped.stopped_early
    assert len(stopped.step_seconds) < len(whole.step_seconds)
    assert stopped.wall_seconds < whole.wall_seconds
    assert stopped.step_seconds == whole.step_seconds[: len(stopped.step_seconds)]


@pytest.mark.parametrize("best_over_own", [0.5, 1.0])
def test_a_configuration_that_is_as_fast_as_the_best_is_measured_to_the_end(best_over_own: float) -> None:
    simulation = Simulation(BIG)
    alone = simulation.measure(config(1, 8))
    assert simulation.measure(config(1, 8), best=best_over_own * alone.samples_per_second) == alone
    assert not alone.stopped_early


def test_a_measurement_is_one_of_noisy_steps_and_adds_up() -> None:
    simulation = Simulation(BIG, plan=PRECISE)
    for each in FITTING:
        measured = simulation.measure(each)
        steps = measured.step_seconds
        assert len(set(steps)) == len(steps) >= 3
        assert 0 < statistics.stdev(steps) / statistics.fmean(steps) < 0.05
        low, high = measured.samples_per_second_ci95
        assert low < measured.samples_per_second < high
        assert measured.samples_per_second == pytest.approx(each.global_batch_size(2) / statistics.fmean(steps))
        parts = measured.forward_seconds + measured.backward_seconds + measured.optimizer_seconds
        assert parts == pytest.approx(statistics.fmean(steps), rel=0.05)
        timed = math.fsum(steps) + math.fsum(measured.warmup_step_seconds)
        assert measured.wall_seconds == pytest.approx(measured.setup_seconds + timed)
        assert measured.model_parameters == 1_557_611_200


def test_stage_3_warms_up_as_long_as_on_a_real_machine() -> None:
    plan = StepPlan()
    simulation = Simulation(BIG, plan=plan)
    for stage in range(4):
        assert len(simulation.measure(config(stage, 1)).warmup_step_seconds) == plan.warmup(stage)


def test_simulated_run_times_as_many_steps_as_its_step_plan() -> None:
    plan = StepPlan(min_timed_steps=2, max_timed_steps=2)
    assert len(Simulation(BIG, plan=plan).measure(config(1, 4)).step_seconds) == 2
