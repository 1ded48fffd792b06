"""A forecast is kept as it was made, to be held against what the trial then did."""

import json

import pytest

from ds_tune.objectives.cost_model.forecast import Excluded, Forecast

FORECAST = Forecast(
    samples_per_second=28.3,
    samples_per_second_ci95=(25.1, 31.9),
    peak_memory_bytes=1.25e11,
    peak_memory_deviation_bytes=1.5e9,
    probability_of_fitting=0.875,
)
EXCLUDED = Excluded(name="z0_gas1_tmbspg32", predicted_peak_memory_bytes=1.88e11, configurations=7)


@pytest.mark.parametrize("kept", [FORECAST, EXCLUDED], ids=["forecast", "excluded"])
def test_nothing_is_lost_on_the_way_through_json(kept: Forecast | Excluded) -> None:
    assert type(kept).from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_a_forecast_that_came_back_is_as_immutable_as_the_one_that_was_stored() -> None:
    again = Forecast.from_json(json.loads(json.dumps(FORECAST.to_json())))
    assert isinstance(again.samples_per_second_ci95, tuple)
    assert hash(again) == hash(FORECAST)


@pytest.mark.parametrize("key", sorted(FORECAST.to_json()))
def test_a_stored_forecast_that_lacks_a_figure_is_not_half_read(key: str) -> None:
    document = FORECAST.to_json()
    del document[key]
    with pytest.raises((TypeError, KeyError)):
        Forecast.from_json(document)
