"""Errors that a plan's intervals are made of, from everything that was recorded."""

import math
from pathlib import Path

import pytest

from ds_tune.objectives.cost_model.hardware import hardware_of, parse_hardware
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.recorded_errors import RECORDED_ERRORS, RECORDED_KINDS, recorded_error
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Measurement

DATA = Path(__file__).parents[3] / "benchmarks" / "data"


def test_19_of_20_recorded_configurations_lie_in_the_interval_and_it_is_no_wider_than_that() -> None:
    errors: dict[str, list[float]] = {}
    for path in [*DATA.glob("*.jsonl"), *(DATA / "models").glob("*.jsonl")]:
        recording = read_recording(path)
        hardware = hardware_of(recording.machine)
        assert hardware.accelerator.name in RECORDED_KINDS
        model = CostModel(recording.workload, hardware)
        for config, outcome in recording.outcomes.items():
            if isinstance(outcome, Measurement):
                step = model.predict(config).step
                ratio = outcome.samples_per_second / step.samples_per_second
                errors.setdefault(step.bottleneck, []).append(abs(math.log(ratio)))
    assert set(errors) == set(RECORDED_ERRORS)
    for bottleneck, found in errors.items():
        inside = sum(error <= RECORDED_ERRORS[bottleneck] for error in found) / len(found)
        assert inside >= 0.95
        if len(found) > 100:
            assert inside <= 0.97


@pytest.mark.parametrize(
    ("hardware", "bottleneck"), [("2xA100-80GB", "compute"), ("8x8xH100", "compute"), ("8xH100", "communication")]
)
def test_what_was_not_recorded_has_no_such_interval(hardware: str, bottleneck: str) -> None:
    assert recorded_error(parse_hardware(hardware), bottleneck) is None
