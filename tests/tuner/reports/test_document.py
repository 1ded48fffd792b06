"""The document that `--json` prints keeps to `tuner/reports/study.schema.json`."""

import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jsonschema
import pytest

from ds_tune.objectives.trial import FailureKind, Provenance
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.report import Report

MakeRecord = Callable[..., TrialRecord]
MakeSummary = Callable[..., StudySummary]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(
        resources.files("ds_tune.tuner.reports").joinpath("study.schema.json").read_text()
    )
    return loaded


@pytest.fixture
def checked(schema: dict[str, Any]) -> Callable[[StudySummary], dict[str, Any]]:
    """The document as a reader gets it, checked against the schema."""

    def check(summary: StudySummary) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(json.dumps(study_document(Report.of(summary)), allow_nan=False))
        jsonschema.Draft202012Validator(schema).validate(document)
        return document

    return check


Checked = Callable[[StudySummary], dict[str, Any]]


def test_the_schema_is_a_schema_of_2020_12(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_a_finished_study(checked: Checked, finished: StudySummary) -> None:
    document = checked(finished)
    assert document["state"] == "finished"
    assert document["best"] == document["trials"][1]
    assert document["baseline"] == document["trials"][0]
    assert document["speedup"]["factor"] == pytest.approx(58.25 / 27.5)
    assert document["best"]["global_batch_size"] == 32
    assert [trial["state"] for trial in document["trials"]] == ["complete", "complete", "complete", "pruned", "failed"]
    assert document["hardware"]["device_ids"] == [0, 1]


def test_an_unfinished_study(checked: Checked, finished: StudySummary, make_summary: MakeSummary) -> None:
    assert checked(make_summary(finished.records, total=9))["state"] == "unfinished"


def test_an_empty_study(checked: Checked, empty: StudySummary) -> None:
    document = checked(empty)
    assert (document["trials"], document["best"], document["baseline"]) == ([], None, None)


def test_a_study_where_nothing_fits(checked: Checked, nothing_fits: StudySummary) -> None:
    document = checked(nothing_fits)
    assert document["state"] == "nothing_fits"
    assert document["ended"] == "not even one sample a rank fits, in any ZeRO stage"
    assert (document["best"], document["speedup"]) == (None, None)
    assert all(trial["samples_per_second"] is None for trial in document["trials"])


@pytest.mark.parametrize("provenance", Provenance)
def test_json_document_names_the_provenance_of_its_figures(
    checked: Checked, finished: StudySummary, provenance: Provenance
) -> None:
    assert checked(dataclasses.replace(finished, provenance=provenance))["figures"] == provenance.value


@pytest.mark.parametrize("source", Source)
@pytest.mark.parametrize("kind", FailureKind)
def test_every_way_to_end_and_every_source(
    checked: Checked, make_record: MakeRecord, make_summary: MakeSummary, kind: FailureKind, source: Source
) -> None:
    [trial] = checked(make_summary([make_record("z0_gas1_tmbspg1", kind=kind, source=source, peak_gib=None)]))["trials"]
    assert (trial["source"], trial["peak_memory_bytes"]) == (source.value, None)
    assert trial["reason"].startswith(kind.value.replace("_", " "))


def test_a_key_that_the_schema_does_not_know_is_found(schema: dict[str, Any], finished: StudySummary) -> None:
    """So that a new key cannot be added to the document alone."""
    with pytest.raises(jsonschema.ValidationError, match="'extra' was unexpected"):
        jsonschema.Draft202012Validator(schema).validate({**study_document(Report.of(finished)), "extra": 1})
