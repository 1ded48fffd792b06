"""Every metric of every trial is in the files, in the document and in Optuna's study."""

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.metric import METRICS
from ds_tune.objectives.trial import Measurement, Provenance
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.identity import Identity
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.storage.study_store import IDENTITY, StudyStore
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.export import trials_csv
from ds_tune.tuner.reports.markdown import metric_table, summary_markdown
from ds_tune.tuner.reports.metrics import metric_line, metric_rows, metric_values
from ds_tune.tuner.reports.report import Report

RATE, FLOPS, PEAK = 58.25, 1.0e13, 989e12
EXPECTED = {
    "samples_per_second": RATE,
    "tokens_per_second": RATE * 1024,
    "tokens_per_second_per_gpu": RATE * 512,
    "tflops_per_gpu": RATE * FLOPS / 2e12,
    "mfu": RATE * FLOPS / 2 / PEAK,
}
"""Of the second trial of `finished`, on two H200s."""


@pytest.fixture
def on_cpus(finished: StudySummary) -> StudySummary:
    machine = dataclasses.replace(finished.machine, device="cpu", name="CPU", compute_capability=None)
    return dataclasses.replace(finished, machine=machine)


def measured(record: TrialRecord) -> Measurement:
    assert isinstance(record.outcome, Measurement)
    return record.outcome


def test_values_are_samples_per_second_in_other_units(finished: StudySummary) -> None:
    values = metric_values(measured(finished.records[1]), finished)
    assert list(values) == list(METRICS)
    assert {name: values[name] for name in EXPECTED} == pytest.approx(EXPECTED)


def test_a_recording_that_tells_no_flops_has_those_of_the_model(finished: StudySummary) -> None:
    recorded = dataclasses.replace(measured(finished.records[1]), flops_per_sample=0.0)
    values = metric_values(recorded, finished)
    # 1.56e9 parameters: 6N + 12·48·1600·1024 FLOPs a token.
    assert values["tflops_per_gpu"] == pytest.approx(RATE * 1024 * (6 * 1_557_611_200 + 12 * 48 * 1600 * 1024) / 2e12)


def test_the_csv_has_a_column_a_metric(finished: StudySummary) -> None:
    rows = list(csv.DictReader(io.StringIO(trials_csv(finished))))
    assert {name: float(rows[1][name]) for name in EXPECTED} == pytest.approx(EXPECTED)
    assert {rows[3][name] for name in METRICS} == {""}


def test_the_csv_leaves_unknown_metrics_empty(on_cpus: StudySummary) -> None:
    rows = list(csv.DictReader(io.StringIO(trials_csv(on_cpus))))
    assert rows[1]["mfu"] == "" and float(rows[1]["tflops_per_gpu"]) == pytest.approx(EXPECTED["tflops_per_gpu"])


def test_the_document_has_every_metric_of_every_trial_and_says_which_peak(finished: StudySummary) -> None:
    document = study_document(Report.of(dataclasses.replace(finished, metric="mfu")))
    assert (document["metric"], document["peak_flops_source"]) == ("mfu", "989 TFLOP/s, data sheet of H200, fp16")
    assert {name: document["best"]["metrics"][name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert document["trials"][3]["metrics"] == dict.fromkeys(METRICS)


def test_the_documents_peak_and_mfu_are_null_where_they_are_not_known(on_cpus: StudySummary) -> None:
    document = study_document(Report.of(on_cpus))
    assert document["peak_flops_source"] is None
    assert document["best"]["metrics"]["mfu"] is None


def test_the_report_has_a_row_a_metric_and_the_peak(finished: StudySummary) -> None:
    text = summary_markdown(Report.of(finished))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["tokens/s", "28160", "59648"] in rows
    assert ["MFU", "13.9%", "29.4%"] in rows
    assert "MFU is a share of 989 TFLOP/s, data sheet of H200, fp16.\n" in text
    assert "maximises" not in text


def test_the_report_says_what_was_maximised_and_that_a_peak_is_unknown(on_cpus: StudySummary) -> None:
    summary = dataclasses.replace(on_cpus, metric="tokens_per_second_per_gpu")
    assert metric_line(summary) == (
        "MFU is not known: this device's peak is not in the catalogue. The study maximises tokens/s a rank."
    )
    assert ["MFU", "–"] in metric_rows([summary.best], summary)


def test_metrics_that_were_not_measured_are_marked(finished: StudySummary) -> None:
    simulated = dataclasses.replace(finished, provenance=Provenance.SIMULATED)
    assert all(row[0].endswith(", simulated") for row in metric_rows([simulated.best], simulated))


def test_a_baseline_that_does_not_run_has_dashes(finished: StudySummary) -> None:
    without = dataclasses.replace(finished, records=finished.records[1:])
    assert {row[1] for row in metric_rows([without.baseline, without.best], without)} == {"–"}
    assert metric_table(without).count("–") == len(METRICS) - 1


def test_verified_rates_stand_in_the_report(finished: StudySummary) -> None:
    best = finished.records[1]
    runs = [dataclasses.replace(measured(best), samples_per_second=50.0)] * 2
    verified = dataclasses.replace(finished, verification={best.config.name: runs})
    assert metric_rows([best], verified)[0][1] == f"{verified.rate(best) * 1024:.0f}"
    assert verified.rate(best) != RATE


def test_optuna_is_told_the_chosen_metric_and_shown_all(
    tmp_path: Path, workload: HuggingFaceWorkload, machine: Machine, make_record: Callable[..., TrialRecord]
) -> None:
    store = opened(tmp_path, Identity(objective="o", workload=workload, machine=machine, space={}, metric="mfu"))
    record = make_record("z1_gas2_tmbspg8", RATE)
    told = tell(store, record)
    assert store.study.metric_names == ["mfu"]
    assert store.study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert told.value == pytest.approx(EXPECTED["mfu"])
    seconds = measured(record).step_seconds
    assert list(told.intermediate_values.values()) == pytest.approx(
        [32 / each * EXPECTED["mfu"] / RATE for each in seconds]
    )
    assert set(METRICS) <= set(told.user_attrs)
    assert {name: told.user_attrs[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert store.summary().metric == "mfu"


def test_a_study_is_not_gone_on_with_in_another_metric(
    tmp_path: Path, workload: HuggingFaceWorkload, machine: Machine, make_record: Callable[..., TrialRecord]
) -> None:
    identity = Identity(objective="o", workload=workload, machine=machine, space={})
    tell(opened(tmp_path, identity), make_record("z1_gas2_tmbspg8", RATE))
    with pytest.raises(UsageError, match="metric samples_per_second there, tokens_per_second here"):
        opened(tmp_path, dataclasses.replace(identity, metric="tokens_per_second"))


def test_a_study_from_before_there_were_metrics_maximises_samples_per_second(
    tmp_path: Path, workload: HuggingFaceWorkload, machine: Machine, make_record: Callable[..., TrialRecord]
) -> None:
    identity = Identity(objective="o", workload=workload, machine=machine, space={})
    store = opened(tmp_path, identity)
    tell(store, make_record("z1_gas2_tmbspg8", RATE))
    old = {key: value for key, value in store.attributes[IDENTITY].items() if key != "metric"}
    store.storage.set_study_system_attr(store.study._study_id, IDENTITY, old)
    again = opened(tmp_path, identity)
    assert (len(again.records()), again.summary().metric) == (1, "samples_per_second")


def opened(folder: Path, identity: Identity) -> StudyStore:
    url = f"sqlite:///{folder}/study.db"
    return StudyStore.create_or_resume(url, "study", identity, {}, optuna.samplers.RandomSampler(0))


def tell(store: StudyStore, record: TrialRecord) -> optuna.trial.FrozenTrial:
    trial = store.ask({})
    record = dataclasses.replace(record, number=trial.number)
    store.save(trial, record)
    store.tell(trial, record)
    return store.study.trials[trial.number]
