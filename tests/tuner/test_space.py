"""The configurations of a study keep to its limits."""

import dataclasses
import itertools
import math

import optuna
import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.trial import CORE_FIELDS, KNOBS, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.dimensions import PRESETS, dimensions_of
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.space import Space


def limits(**changes: int) -> Limits:
    return Limits(**{"ranks": 2, "max_micro_batch": 6, "max_global_batch": 24, **changes})


def test_every_legal_configuration_keeps_to_the_limits_and_none_is_missing() -> None:
    legal = Space(limits()).legal
    assert len({config.name for config in legal}) == len(legal)
    assert {(config.zero_stage, config.micro_batch_size, config.gradient_accumulation_steps) for config in legal} == {
        (stage, mbs, gas) for stage in range(4) for mbs in range(1, 7) for gas in range(1, 13) if 2 * mbs * gas <= 24
    }


def test_large_batch_sizes_are_a_twentieth_and_a_quarter_apart() -> None:
    legal = Space(limits(max_micro_batch=1000, max_global_batch=2_000_000)).legal
    sizes = sorted({config.micro_batch_size for config in legal})
    assert sizes[:128] == list(range(1, 129))
    assert sizes[-1] == 1000
    assert all(larger <= math.ceil(1.05 * size) for size, larger in itertools.pairwise(sizes))
    accumulations = sorted({config.gradient_accumulation_steps for config in legal if config.micro_batch_size == 1000})
    assert accumulations[:128] == list(range(1, 129))
    assert accumulations[128:] == [160, 200, 250, 313, 392, 490, 613, 767, 959, 1000]


def test_beside_other_knobs_the_largest_global_batch_is_in_reach_of_every_micro_batch() -> None:
    space = Space(limits(max_micro_batch=16, max_global_batch=256), dimensions_of("speed", H200), context=H200)
    most = {
        size: max(config.gradient_accumulation_steps for config in space.legal if config.micro_batch_size == size)
        for size in (1, 3, 12, 16)
    }
    assert most == {1: 128, 3: 42, 12: 10, 16: 8}


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
    names = [config.name for config in Space(limits()).baselines]
    assert names == ["z0_gas1_tmbspg1", "z1_gas1_tmbspg1", "z2_gas1_tmbspg1", "z3_gas1_tmbspg1"]


def test_a_stage_that_loses_gradients_is_no_part_of_the_space_nor_its_baseline() -> None:
    context = KnobContext(stage_0_trains=False)
    space = Space(limits(), dimensions_of("speed", context), context=context)
    assert {config.zero_stage for config in (*space.legal, *space.baselines)} == {1, 2, 3}
    assert space.baselines[0].name == "z1_gas1_tmbspg1"


def test_the_baseline_of_a_global_batch_trains_on_that_batch() -> None:
    space = Space(limits(global_batch=24))
    assert next(config.name for config in space.baselines) == "z0_gas12_tmbspg1"
    assert set(space.baselines) <= set(space.legal)


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


def config(stage: int, mbs: int, gas: int = 1, ckpt: int = 0) -> TrialConfig:
    return TrialConfig(
        zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas, activation_checkpointing=ckpt
    )


SOME = [config(3, 2), config(1, 6, 2), config(1, 1), config(3, 2, 1, 2), config(1, 1, 4, 2), config(1, 3)]


def test_the_core_space_is_stored_as_it_always_was() -> None:
    """Anything else, and no study begun before could go on."""
    assert Space(limits()).to_json() == {
        "dimensions": {
            "zero_stage": '{"name": "CategoricalDistribution", "attributes": {"choices": [0, 1, 2, 3]}}',
            "micro_batch_size": '{"name": "IntDistribution", "attributes": '
            '{"log": true, "step": 1, "low": 1, "high": 6}}',
            "gradient_accumulation_steps": '{"name": "IntDistribution", "attributes": '
            '{"log": true, "step": 1, "low": 1, "high": 12}}',
        },
        "max_global_batch": 24,
        "global_batch": None,
    }
    assert all(config.activation_checkpointing == 0 for config in Space(limits()).legal)


def test_a_restricted_space_holds_exactly_what_it_is_given() -> None:
    space = Space(limits(), restricted_to=[*SOME, SOME[0]])
    assert space.legal == (
        config(1, 1), config(1, 3), config(1, 6, 2), config(1, 1, 4, 2), config(3, 2), config(3, 2, 1, 2),
    )  # fmt: skip
    for legal in space.legal:
        params = space.params(legal)
        assert set(params) == set(space.distributions) == {*CORE_FIELDS, "activation_checkpointing"}
        trial = optuna.trial.create_trial(params=params, distributions=space.distributions, value=1.0)
        assert space.config_of(trial) == legal
    assert space.distributions["activation_checkpointing"] == optuna.distributions.CategoricalDistribution([0, 2])
    assert space.distributions["zero_stage"] == optuna.distributions.CategoricalDistribution([1, 3])
    assert space.distributions["micro_batch_size"] == optuna.distributions.IntDistribution(1, 6, log=True)


def test_a_knob_that_is_off_everywhere_is_no_dimension_and_one_that_is_on_is() -> None:
    assert "activation_checkpointing" not in Space(limits(), restricted_to=[config(0, 1), config(1, 2)]).distributions
    space = Space(limits(), restricted_to=[config(0, 1, 1, 1), config(1, 2, 1, 1)])
    assert [TrialConfig(**space.params(legal)) for legal in space.legal] == list(space.legal)


def test_a_restricted_space_keeps_to_the_limits_too() -> None:
    assert Space(limits(max_micro_batch=2), restricted_to=SOME).legal == (
        config(1, 1), config(1, 1, 4, 2), config(3, 2), config(3, 2, 1, 2),
    )  # fmt: skip
    assert Space(limits(global_batch=24), restricted_to=SOME).legal == (config(1, 6, 2),)
    with pytest.raises(UsageError, match="none of the 6 configurations that may be tried keeps to the limits"):
        Space(limits(global_batch=22), restricted_to=SOME)


def test_the_baselines_of_a_restricted_space_are_the_smallest_and_save_memory_last() -> None:
    assert Space(limits(), restricted_to=SOME).baselines == (
        config(1, 1), config(3, 2), config(1, 1, 4, 2), config(3, 2, 1, 2),
    )  # fmt: skip
    recorded = Space(limits(), restricted_to=Space(limits()).legal)
    assert recorded.baselines == Space(limits()).baselines


def test_another_restriction_is_another_space() -> None:
    documents = [
        Space(limits(), restricted_to=restricted_to).to_json() for restricted_to in (SOME, SOME[:5], SOME[::-1])
    ]
    assert documents[0] != documents[1]
    assert documents[0] == documents[2] != Space(limits()).to_json()


def test_the_nearest_configuration_is_of_the_same_knobs() -> None:
    space = Space(limits(), restricted_to=SOME)
    params = space.params(config(1, 4, 3, 2))
    assert space.nearest(params, space.legal) == config(1, 1, 4, 2)
    assert space.nearest(params, [config(3, 2, 1, 2), config(1, 6, 2)]) == config(1, 6, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"global_batch": 7}, "`global_batch=7` must be a multiple of the 2 ranks"),
        ({"max_global_batch": 1}, "`max_global_batch=1` is less than one sample on each of 2 ranks"),
        ({"max_micro_batch": 0}, r"`max_micro_batch` must be at least 1 \(got 0\)"),
    ],
)
def test_limits_that_nothing_keeps_are_refused(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Space(limits(**changes))


@pytest.mark.parametrize("changes", [{"max_micro_batch": 5}, {"max_global_batch": 26}, {"global_batch": 24}])
def test_other_limits_are_another_space(changes: dict[str, int]) -> None:
    assert Space(limits(**changes)).to_json() != Space(limits()).to_json()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_preset_enumerates_to_legal_configurations_only(preset: str, device: str, ranks: int) -> None:
    """Legal: each knob that is on does something there, no two are the same, and Optuna can hold each."""
    bounds = Limits(ranks=ranks, max_micro_batch=4, max_global_batch=8 * ranks)
    context = KnobContext(device=device, ranks=ranks, vocabulary=50257)
    space = Space(bounds, dimensions_of(preset), context=context)
    assert len({config.name for config in space.legal}) == len(space.legal)
    for config in space.legal:
        kind = config.to_json()
        assert all(KNOBS[field].applies(kind, context) for field in config.knobs_on)
        assert all(value in KNOBS[field].values for field, value in config.knobs_on.items())
        assert bounds.allow(config)
    for name, value in space.params(space.legal[-1]).items():
        assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value))
    assert set(space.baselines) <= set(space.legal)


def test_the_presets_are_each_part_of_the_next() -> None:
    bounds, context = limits(max_global_batch=8), KnobContext(ranks=2, vocabulary=50257)
    core, speed, full = (
        {
            (config.zero_stage, *config.knobs_on.items())
            for config in Space(bounds, dimensions_of(preset), context=context).legal
        }
        for preset in PRESETS
    )
    assert core < speed < full


GPT2_XL = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
H200 = KnobContext(compute_capability=(9, 0), vocabulary=50257, model_type="gpt2", liger=True)
V100 = KnobContext(compute_capability=(7, 0), vocabulary=50257, model_type="gpt2")


@pytest.mark.parametrize(
    ("knobs", "stage", "context"),
    [
        ({"compile": "blocks"}, 3, KnobContext(ranks=2)),
        ({"padded_vocabulary": 64}, 0, KnobContext(vocabulary=50304)),
        ({"overlap_comm": "on"}, 0, KnobContext(ranks=2)),
        ({"overlap_comm": "on"}, 2, KnobContext(ranks=1)),
        ({"offload_optimizer": "cpu"}, 0, KnobContext(ranks=2)),
        ({"offload_optimizer": "cpu"}, 1, KnobContext(ranks=2, device="cpu")),
        ({"prefetch_elements": 200_000_000}, 2, KnobContext(ranks=2)),
        ({"round_robin_gradients": "on"}, 3, KnobContext(ranks=2)),
        ({"optimizer": "torch_fused"}, 0, KnobContext(device="cpu")),
        ({"compile": "deepcompile"}, 0, H200),
        ({"compile": "deepcompile"}, 1, H200),
        ({"compile": "deepcompile"}, 2, KnobContext(device="cpu")),
        ({"attention": "sdpa_flash"}, 0, V100),
        ({"attention": "sdpa_cudnn"}, 0, V100),
        ({"attention": "sdpa_cudnn"}, 0, KnobContext(compute_capability=(8, 0))),
        ({"attention": "sdpa_flash"}, 0, KnobContext(compute_capability=(9, 0), dtype="fp32")),
        ({"attention": "sdpa_efficient"}, 0, KnobContext(grouped_queries=True)),
        ({"attention": "flash_attention_2"}, 0, H200),
        ({"attention": "flash_attention_2"}, 0, dataclasses.replace(H200, flash_attention=True, dtype="fp32")),
        ({"attention": "sdpa_efficient"}, 0, KnobContext(device="cpu")),
        ({"loss_computation": "chunked"}, 0, KnobContext(model_type="bert")),
        ({"loss_computation": "liger"}, 0, H200),
        ({"loss_computation": "liger"}, 0, dataclasses.replace(H200, dtype="bf16", liger=False)),
        ({"loss_computation": "liger"}, 0, dataclasses.replace(V100, dtype="fp32", liger=True)),
        ({"offload_optimizer": "cpu_half"}, 2, KnobContext(ranks=2)),
        ({"offload_parameters": "cpu"}, 2, KnobContext(ranks=2)),
        ({"offload_parameters": "cpu"}, 3, KnobContext(device="cpu", ranks=2)),
        ({"parameter_group": 2}, 3, KnobContext(ranks=2)),
        ({"parameter_group": 4}, 3, KnobContext(ranks=6)),
        ({"parameter_group": 2}, 2, KnobContext(ranks=4)),
    ],
)
def test_a_knob_exists_only_where_it_has_a_meaning(knobs: dict[str, object], stage: int, context: KnobContext) -> None:
    space = Space(Limits(ranks=context.ranks, max_micro_batch=1, max_global_batch=context.ranks), dimensions_of("full"),
                  context=context)  # fmt: skip
    assert not any(config.zero_stage == stage and knobs.items() <= config.knobs_on.items() for config in space.legal)


@pytest.mark.parametrize(
    ("knobs", "stage", "context"),
    [
        ({"attention": "sdpa_flash"}, 0, H200),
        ({"attention": "flash_attention_2"}, 0, dataclasses.replace(H200, flash_attention=True)),
        ({"attention": "sdpa_cudnn"}, 0, H200),
        ({"attention": "sdpa_efficient"}, 0, V100),
        ({"loss_computation": "chunked"}, 3, H200),
        ({"loss_computation": "chunked", "compile": "blocks", "padded_vocabulary": 64}, 1, V100),
        ({"loss_computation": "liger"}, 0, dataclasses.replace(H200, dtype="bf16")),
        ({"compile": "deepcompile"}, 2, H200),
        ({"compile": "deepcompile"}, 3, H200),
        ({"offload_optimizer": "cpu_half"}, 3, H200),
        ({"offload_parameters": "cpu"}, 3, H200),
        ({"parameter_group": 4}, 3, KnobContext(ranks=8)),
    ],
)
def test_a_knob_is_offered_where_it_has_a_meaning(knobs: dict[str, object], stage: int, context: KnobContext) -> None:
    space = Space(Limits(ranks=context.ranks, max_micro_batch=1, max_global_batch=context.ranks), dimensions_of("full"),
                  context=context)  # fmt: skip
    assert any(config.zero_stage == stage and knobs == config.knobs_on for config in space.legal)


@pytest.mark.parametrize(
    ("field", "context", "stages"),
    [
        ("precision", H200, {0, 1, 2, 3}),
        ("precision", V100, set()),
        ("precision", dataclasses.replace(H200, dtype="bf16"), set()),
        ("vocabulary", H200, {0, 1, 2, 3}),
        ("vocabulary", dataclasses.replace(H200, vocabulary=50304), set()),
        ("vocabulary", dataclasses.replace(H200, pretrained=True), set()),
        ("quantized_weights", dataclasses.replace(H200, ranks=2), {3}),
        ("quantized_weights", H200, set()),
        ("quantized_weights", KnobContext(device="cpu", ranks=2), set()),
    ],
)
def test_numerics_changing_knob_is_in_the_space_only_where_it_has_a_meaning(
    field: str, context: KnobContext, stages: set[int]
) -> None:
    bounds = Limits(ranks=context.ranks, max_micro_batch=1, max_global_batch=context.ranks)
    space = Space(bounds, dimensions_of("speed", allowed={field}), context=context)
    on = [config for config in space.legal if field in config.knobs_on]
    assert {config.zero_stage for config in on} == stages
    assert not any(config.vocabulary and config.padded_vocabulary for config in on)


def test_dropout_is_searched_only_where_its_change_of_numerics_is_allowed() -> None:
    bounds = limits(max_global_batch=2)
    assert not any("dropout" in config.knobs_on for config in Space(bounds, dimensions_of("full")).legal)
    allowed = Space(bounds, dimensions_of("core", allowed={"dropout"}))
    assert {config.dropout for config in allowed.legal} == {"model", "none"}


@pytest.mark.parametrize("field", KNOBS)
def test_every_knob_says_what_it_means_and_has_a_name_of_its_own(field: str) -> None:
    knob = KNOBS[field]
    assert len(knob.meaning) > 20
    assert knob.off not in knob.values and knob.values
    assert set(knob.speed) <= set(knob.values)
    assert [other.label for other in KNOBS.values()].count(knob.label) == 1
    names = {TrialConfig(zero_stage=1, micro_batch_size=1, gradient_accumulation_steps=1, **{field: value}).name
             for value in (knob.off, *knob.values)}  # fmt: skip
    assert len(names) == 1 + len(knob.values)


def test_the_optimizer_is_offloaded_where_its_states_crowd_the_memory_and_otherwise_only_in_full() -> None:
    roomy, crowded = (dataclasses.replace(H200, states_share=share) for share in (0.3, 0.7))
    bounds = Limits(ranks=1, max_micro_batch=2, max_global_batch=2)
    offloads = {
        (preset, context.states_share): {config.offload_optimizer for config in legal(bounds, preset, context)}
        for preset in PRESETS
        for context in (roomy, crowded)
    }
    assert offloads["core", 0.7] == offloads["speed", 0.3] == {"off"}
    assert offloads["speed", 0.7] == {"off", "cpu"}
    assert offloads["full", 0.3] == offloads["full", 0.7] == {"off", "cpu", "cpu_half"}


def legal(bounds: Limits, preset: str, context: KnobContext) -> tuple[TrialConfig, ...]:
    return Space(bounds, dimensions_of(preset, context), context=context).legal


def test_the_last_baselines_save_as_much_memory_as_the_space_can() -> None:
    bounds = Limits(ranks=1, max_micro_batch=2, max_global_batch=4)

    def fallbacks(preset: str, context: KnobContext) -> list[str]:
        found = Space(bounds, dimensions_of(preset, context), context=context).baselines
        assert [config.zero_stage for config in found[:4]] == [0, 1, 2, 3] and not any(c.knobs_on for c in found[:4])
        return [config.name for config in found[4:]]

    crowded = dataclasses.replace(H200, states_share=0.7)
    assert fallbacks("core", crowded) == []
    assert fallbacks("speed", H200) == [f"z{stage}_ac1_gas1_tmbspg1" for stage in range(4)]
    assert fallbacks("speed", crowded) == [f"z{stage}_ac1_offload-cpu_gas1_tmbspg1" for stage in (1, 2, 3)]
    assert fallbacks("full", crowded) == ["z3_ac1_offload-cpu_poffload-cpu_gas1_tmbspg1"]
