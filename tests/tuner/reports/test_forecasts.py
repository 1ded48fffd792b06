"""What was predicted of trials, against what they did; and what was not launched because it certainly does not fit."""

import dataclasses
import json
from collections.abc import Callable
from importlib import resources

import jsonschema
import pytest

from ds_tune.objectives.cost_model.forecast import Excluded, Forecast
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import FailureKind, Measurement
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.console import forecast_lines
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.forecasts import ForecastErrors, forecast_errors
from ds_tune.tuner.reports.markdown import summary_markdown
from ds_tune.tuner.reports.report import Report

MakeRecord = Callable[..., TrialRecord]
MakeSummary = Callable[..., StudySummary]


def forecast(samples_per_second: float, peak_gib: float) -> Forecast:
    return Forecast(
        samples_per_second=samples_per_second,
        samples_per_second_ci95=(0.5 * samples_per_second, 2 * samples_per_second),
        peak_memory_bytes=peak_gib * GIB,
        peak_memory_deviation_bytes=0.5 * GIB,
        probability_of_fitting=0.75,
    )


@pytest.fixture
def forecasted(make_record: MakeRecord, make_summary: MakeSummary) -> StudySummary:
    """Three measured trials, predicted better each time; one out of memory, one crash and one without a forecast."""
    records = [
        dataclasses.replace(make_record(name, rate, number=number, peak_gib=peak_gib, **ended), forecast=believed)
        for number, (name, rate, peak_gib, ended, believed) in enumerate(
            [
                ("z0_gas1_tmbspg1", 20.0, 10.0, {}, forecast(30.0, 9.0)),
                ("z1_gas1_tmbspg2", 40.0, 12.0, {}, forecast(36.0, 12.6)),
                ("z1_gas1_tmbspg64", None, 24.0, {}, forecast(99.0, 23.0)),
                ("z2_gas1_tmbspg2", None, 12.0, {"kind": FailureKind.CRASH}, forecast(99.0, 1.0)),
                ("z1_gas1_tmbspg4", 50.0, 16.0, {}, forecast(50.5, 16.0)),
                ("z3_gas1_tmbspg4", 10.0, 16.0, {}, None),
            ]
        )
    ]
    return make_summary(records)


EXCLUDED = [
    Excluded(name="z0_gas2_tmbspg9", predicted_peak_memory_bytes=35.5 * GIB, configurations=58),
    Excluded(name="z3_gas1_tmbspg17", predicted_peak_memory_bytes=26.0 * GIB, configurations=1),
]


def test_errors_are_those_of_the_trials_that_were_measured(forecasted: StudySummary) -> None:
    errors = forecast_errors(forecasted)
    assert errors is not None
    assert errors == ForecastErrors(
        trials=3,
        rate_median=pytest.approx(0.1),
        rate_worst=pytest.approx(0.5),
        memory_median=pytest.approx(0.05),
        memory_worst=pytest.approx(0.1),
        last_rates=errors.last_rates,
    )
    assert errors.last_rates == pytest.approx((0.5, -0.1, 0.01))


def test_a_trial_that_was_stopped_early_has_shown_how_slow_it_is(forecasted: StudySummary) -> None:
    stopped = forecasted.records[1]
    assert isinstance(stopped.outcome, Measurement)
    stopped = dataclasses.replace(stopped, outcome=dataclasses.replace(stopped.outcome, stopped_early=True))
    records = [forecasted.records[0], stopped, *forecasted.records[2:]]
    assert forecast_errors(dataclasses.replace(forecasted, records=records)) == forecast_errors(forecasted)


def test_without_a_forecast_of_anything_measured_there_are_no_errors(
    forecasted: StudySummary, finished: StudySummary, empty: StudySummary
) -> None:
    out_of_memory = dataclasses.replace(forecasted, records=forecasted.records[2:4])
    for summary in (out_of_memory, finished, empty):
        assert forecast_errors(summary) is None
        assert study_document(Report.of(summary))["forecast_errors"] is None
        assert "## Cost model" not in summary_markdown(Report.of(summary))


def test_the_report_says_how_wrong_it_was(forecasted: StudySummary) -> None:
    text = summary_markdown(Report.of(forecasted))
    assert (
        "Over 3 trials the predicted samples/s were off by 10.0% in the median and 50.0% at most, the predicted peak "
        "memory by 5.0% and 10.0%. Samples/s, trial by trial: +50%, -10%, +1%."
    ) in text
    assert text.index("## Trials") < text.index("## Cost model") < text.index("## How this was measured")


def test_the_console_has_no_median_of_one(forecasted: StudySummary) -> None:
    one = dataclasses.replace(forecasted, records=forecasted.records[:1])
    assert forecast_lines(Report.of(forecasted)) == [
        "Forecasts were off by 10% in samples/s and 5.0% in peak memory (medians of 3 forecasts)."
    ]
    assert forecast_lines(Report.of(one))[0].endswith("% in peak memory (one forecast).")


def test_the_document_has_the_errors_and_each_trials_forecast(forecasted: StudySummary) -> None:
    document = json.loads(json.dumps(study_document(Report.of(dataclasses.replace(forecasted, excluded=EXCLUDED)))))
    schema = json.loads(resources.files("ds_tune.tuner.reports").joinpath("study.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    errors = forecast_errors(forecasted)
    assert errors is not None
    assert document["forecast_errors"] == {**dataclasses.asdict(errors), "last_rates": list(errors.last_rates)}
    first, *_, last = document["trials"]
    assert first["forecast"] == {
        "samples_per_second": 30.0,
        "samples_per_second_ci95": [15.0, 60.0],
        "peak_memory_bytes": 9.0 * GIB,
        "peak_memory_deviation_bytes": 0.5 * GIB,
        "probability_of_fitting": 0.75,
    }
    assert last["forecast"] is None


def test_report_lists_configurations_not_launched_with_their_predicted_peak(forecasted: StudySummary) -> None:
    assert study_document(Report.of(forecasted))["not_launched"] == []
    assert "## Not launched" not in summary_markdown(Report.of(forecasted))
    summary = dataclasses.replace(forecasted, excluded=EXCLUDED)
    assert study_document(Report.of(summary))["not_launched"] == [
        {"name": "z0_gas2_tmbspg9", "predicted_peak_memory_bytes": 35.5 * GIB, "configurations": 58},
        {"name": "z3_gas1_tmbspg17", "predicted_peak_memory_bytes": 26.0 * GIB, "configurations": 1},
    ]
    text = summary_markdown(Report.of(summary)).partition("## Not launched\n\n")[2]
    assert text.startswith("These certainly need more than the 24.00 GiB of a rank:\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert cells[0] == ["smallest micro-batch", "peak GiB, predicted", "configurations"]
    assert cells[2:] == [["z0_gas2_tmbspg9", "35.50", "58"], ["z3_gas1_tmbspg17", "26.00", "1"]]


def test_forecasts_come_back_from_json_as_they_were(forecasted: StudySummary) -> None:
    for record in forecasted.records:
        assert TrialRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    for each in EXCLUDED:
        assert Excluded.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_a_record_from_before_there_were_forecasts_is_read(make_record: MakeRecord) -> None:
    record = make_record("z1_gas2_tmbspg8", 30.0)
    old = record.to_json()
    del old["forecast"]
    assert TrialRecord.from_json(old) == record
