"""The configurations of a study keep to its limits."""

import math

import optuna
import pytest

from objectives.errors import UsageError
from objectives.trial import TrialConfig
from tuner.space import DIMENSIONS, Limits, Space


def limits(**changes: int) -> Limits:
    return Limits(**{"ranks": 2, "max_micro_batch": 6, "max_global_batch": 24, **changes})


def test_every_legal_configuration_keeps_to_the_limits_and_none_is_missing() -> None:
    legal = Space(limits()).legal
    assert len({config.name for config in legal}) == len(legal)
    assert {(config.zero_stage, config.micro_batch_size, config.gradient_accumulation_steps) for config in legal} == {
        (stage, mbs, gas) for stage in range(4) for mbs in range(1, 7) for gas in range(1, 13) if 2 * mbs * gas <= 24
    }


def test_a_global_batch_fixes_the_product_and_gas_follows() -> None:
    legal = Space(limits(global_batch=24)).legal
    assert all(config.global_batch_size(2) == 24 for config in legal)
    # The divisors of 12 samples a rank up to the largest micro-batch, in each of four stages.
    assert sorted({config.micro_batch_size for config in legal}) == [1, 2, 3, 4, 6]
    assert len(legal) == 20


@pytest.mark.parametrize("changes", [{}, {"global_batch": 24}, {"max_micro_batch": 1}, {"max_global_batch": 2}])
def test_each_legal_configuration_is_one_that_optuna_can_hold(changes: dict[str, int]) -> None:
    space = Space(limits(**changes))
    for config in space.legal:
        for name, value in space.params(config).items():
            assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value))


def test_parameters_and_configurations_are_the_same_thing() -> None:
    space = Space(limits())
    config = TrialConfig(zero_stage=2, micro_batch_size=3, gradient_accumulation_steps=4)
    params = space.params(config)
    trial = optuna.trial.create_trial(params=params, distributions=space.distributions, value=1.0)
    assert space.config_of(trial) == config


def test_a_trial_with_half_of_its_parameters_has_no_configuration() -> None:
    space = Space(limits())
    half = {"zero_stage": space.distributions["zero_stage"]}
    trial = optuna.trial.create_trial(params={"zero_stage": 1}, distributions=half, value=1.0)
    assert space.config_of(trial) is None


def test_the_baseline_is_untuned_and_falls_back_to_more_partitioning() -> None:
    names = [config.name for config in Space(limits()).baselines()]
    assert names == ["z0_gas1_tmbspg1", "z1_gas1_tmbspg1", "z2_gas1_tmbspg1", "z3_gas1_tmbspg1"]


def test_the_baseline_of_a_global_batch_trains_on_that_batch() -> None:
    space = Space(limits(global_batch=24))
    assert next(config.name for config in space.baselines()) == "z0_gas12_tmbspg1"
    assert set(space.baselines()) <= set(space.legal)


def test_the_nearest_configuration_is_of_the_same_stage_and_nearest_in_doublings() -> None:
    space = Space(limits())
    params = {"zero_stage": 1, "micro_batch_size": 6, "gradient_accumulation_steps": 12}
    nearest = space.nearest(params, space.legal)
    assert nearest.zero_stage == 1
    distance = min(
        math.hypot(math.log2(mbs / 6), math.log2(gas / 12)) for mbs in range(1, 7) for gas in range(1, 13 // mbs + 1)
    )
    found = math.hypot(math.log2(nearest.micro_batch_size / 6), math.log2(nearest.gradient_accumulation_steps / 12))
    assert found == pytest.approx(distance)
    elsewhere = [config for config in space.legal if config.zero_stage == 3]
    assert space.nearest(params, elsewhere).zero_stage == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"global_batch": 7}, "--global-batch 7 must be a multiple of the 2 ranks"),
        ({"max_global_batch": 1}, "--max-global-batch 1 is less than one sample on each of 2 ranks"),
        ({"max_micro_batch": 0}, r"--max-micro-batch must be at least 1 \(got 0\)"),
    ],
)
def test_limits_that_nothing_keeps_are_refused(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Space(limits(**changes))


@pytest.mark.parametrize("changes", [{"max_micro_batch": 5}, {"max_global_batch": 26}, {"global_batch": 24}])
def test_other_limits_are_another_space(changes: dict[str, int]) -> None:
    assert Space(limits(**changes)).to_json() != Space(limits()).to_json()


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda dimension: dimension.field)
def test_every_dimension_is_a_field_of_the_configuration_with_values_in_order(dimension: object) -> None:
    [found] = [known for known in DIMENSIONS if known is dimension]
    assert found.field in TrialConfig.__dataclass_fields__
    values = list(found.values(limits()))
    assert values == sorted(set(values))
