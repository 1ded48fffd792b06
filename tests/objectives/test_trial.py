"""What a trial is asked and what it answers, and their JSON."""

import dataclasses
import json

import pytest

from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.trial import (
    Failure,
    FailureKind,
    Measurement,
    Outcome,
    Provenance,
    TrialConfig,
    outcome_from_json,
)

MEASUREMENT = Measurement(
    step_seconds=(0.5, 0.25),
    samples_per_second=16.0,
    samples_per_second_ci95=(8.0, 32.0),
    forward_seconds=0.1,
    backward_seconds=0.2,
    optimizer_seconds=0.05,
    deepspeed_samples_per_second=None,
    warmup_step_seconds=(1.0,),
    skipped_steps=0,
    peak_memory_bytes=3 * 2**30,
    reserved_memory_bytes=4 * 2**30,
    alloc_retries=0,
    setup_seconds=5.0,
    wall_seconds=9.0,
    model_parameters=1_350_400,
    flops_per_sample=1e9,
)
FAILURE = Failure(
    kind=FailureKind.OUT_OF_MEMORY,
    message="rank 1 in backward: no memory",
    phase="backward",
    rank=1,
    peak_memory_bytes=2**30,
    log_tail="the last lines",
    wall_seconds=2.0,
)


def test_a_configuration_has_the_name_that_deepspeed_gives_it() -> None:
    config = TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=2)
    assert config.name == "z1_gas2_tmbspg4"


def test_checkpointing_is_in_the_name_where_it_is_on() -> None:
    config = TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=2, activation_checkpointing=3)
    assert config.name == "z1_ac3_gas2_tmbspg4"


@pytest.mark.parametrize("provenance", Provenance)
def test_figures_that_were_not_measured_carry_the_word(provenance: Provenance) -> None:
    marked = provenance.mark("samples/s")
    assert marked == ("samples/s" if provenance is Provenance.MEASURED else f"samples/s, {provenance.value}")


def test_the_global_batch_is_what_all_ranks_take_in_one_optimizer_step() -> None:
    config = TrialConfig(zero_stage=0, micro_batch_size=4, gradient_accumulation_steps=2)
    assert config.global_batch_size(ranks=16) == 128


def test_a_configuration_survives_json() -> None:
    config = TrialConfig(zero_stage=3, micro_batch_size=4, gradient_accumulation_steps=2)
    assert TrialConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


FROM_PARTS = dataclasses.replace(MEASUREMENT, from_parts=StepParts.of([[0.2, 0.1, 0.1, 0.3]], 64))


@pytest.mark.parametrize("outcome", [MEASUREMENT, FROM_PARTS, FAILURE], ids=["measurement", "from parts", "failure"])
def test_an_outcome_survives_json_and_says_its_type_there(outcome: Outcome) -> None:
    document = json.loads(json.dumps(outcome.to_json()))
    assert document["type"] == type(outcome).__name__.lower()
    assert outcome_from_json(document) == outcome


def test_a_measurement_from_before_steps_were_put_together_is_one_of_whole_steps() -> None:
    document = MEASUREMENT.to_json()
    del document["from_parts"]
    assert outcome_from_json(document) == MEASUREMENT


def test_a_measurement_from_before_tokens_were_counted_has_none() -> None:
    document = dataclasses.replace(MEASUREMENT, tokens_per_second=512.0).to_json()
    assert outcome_from_json(document) != MEASUREMENT
    del document["tokens_per_second"]
    assert outcome_from_json(document) == MEASUREMENT


def test_an_outcome_of_no_known_type_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'guess'"):
        outcome_from_json({"type": "guess"})
