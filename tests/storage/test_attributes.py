"""Studies keep their records where Optuna prints nothing, and earlier ones, in user attributes, are read."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from ds_tune.storage.attributes import PREFIX, RECORD, USER_RECORD, record_of
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import Source, TrialRecord
from ds_tune.storage.study_store import Identity, StudyStore
from ds_tune.tuner.reports.export import export
from ds_tune.tuner.reports.report import Report

MakeRecord = Callable[..., TrialRecord]
SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "zero_stage": optuna.distributions.CategoricalDistribution((0, 1, 2, 3)),
    "micro_batch_size": optuna.distributions.IntDistribution(1, 64),
    "gradient_accumulation_steps": optuna.distributions.IntDistribution(1, 64),
}


def opened(folder: Path, identity: Identity) -> StudyStore:
    url = f"sqlite:///{folder}/study.db"
    return StudyStore.create_or_resume(url, "study", identity, {"torch": "2"}, optuna.samplers.RandomSampler(0))


def ask(store: StudyStore, record: TrialRecord) -> optuna.Trial:
    store.enqueue(record.config.to_json(), record.source)
    return store.ask(SPACE)


@pytest.fixture
def study(tmp_path: Path, identity: Identity, make_record: MakeRecord) -> Path:
    """The folder of a study with a baseline, a winner, and a trial that was saved and not yet told."""
    store = opened(tmp_path, identity)
    store.set_target(4)
    for number, (name, rate) in enumerate((("z0_gas1_tmbspg1", 20.0), ("z1_gas2_tmbspg4", 40.0))):
        record = make_record(name, rate, number=number, source=Source.SEARCH if number else Source.BASELINE)
        trial = ask(store, record)
        store.save(trial, record)
        store.tell(trial, record)
        store.add_verification(name, record.outcome)  # type: ignore[arg-type]
    store.set_winner("z1_gas2_tmbspg4", [], [])
    store.add_seconds(60.0)
    saved = make_record("z1_gas1_tmbspg64", number=2)
    store.save(ask(store, saved), saved)
    return tmp_path


def move_to_user_attributes(database: Path) -> None:
    """Lays a study out as earlier versions did."""
    with sqlite3.connect(database) as connection:
        for kind, renamed in (("trial", {RECORD: USER_RECORD}), ("study", {})):
            found = connection.execute(
                f"SELECT {kind}_id, key, value_json FROM {kind}_system_attributes WHERE key LIKE ?", (f"{PREFIX}%",)
            ).fetchall()
            rows = [(owner, renamed.get(key, key), value) for owner, key, value in found]
            assert rows
            insert = f"INSERT INTO {kind}_user_attributes ({kind}_id, key, value_json) VALUES (?, ?, ?)"
            connection.executemany(insert, rows)
            connection.execute(f"DELETE FROM {kind}_system_attributes WHERE key LIKE ?", (f"{PREFIX}%",))
    connection.close()


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text().replace(str(folder), "") for path in files}


def test_a_study_with_records_in_user_attributes_opens_resumes_and_exports_alike(
    study: Path, identity: Identity, make_record: MakeRecord
) -> None:
    url = f"sqlite:///{study}/study.db"
    before = StudyStore.load(url, None).summary()
    export(Report.of(before), ResultsFolder(study / "before"))
    move_to_user_attributes(study / "study.db")

    store = StudyStore.load(url, None)
    assert "ds_tune:identity" in store.study.user_attrs and USER_RECORD in store.study.trials[0].user_attrs
    assert store.summary() == before
    export(Report.of(store.summary()), ResultsFolder(study / "after"))
    assert contents(study / "after") == contents(study / "before")

    store = opened(study, identity)
    assert store.recover(lambda trial: None) == []
    assert [record.number for record in store.records()] == [0, 1, 2]
    assert store.study.trials[2].state is optuna.trial.TrialState.PRUNED
    record = make_record("z2_gas1_tmbspg4", 41.0, number=3)
    trial = ask(store, record)
    store.save(trial, record)
    store.tell(trial, record)
    # What is stored now counts, and not what the user attributes still say.
    store.add_seconds(5.0)
    store.set_winner("z2_gas1_tmbspg4", ["z1_gas2_tmbspg4"], [])
    summary = opened(study, identity).summary()
    assert (summary.winner, summary.tied, summary.tuning_seconds) == ("z2_gas1_tmbspg4", ["z1_gas2_tmbspg4"], 65.0)
    assert summary.records[:2] == before.records and summary.records[3] == record


def test_a_trial_of_another_program_has_no_record() -> None:
    assert record_of(optuna.trial.create_trial(value=1.0, user_attrs={"name": "theirs"})) is None


def test_a_record_is_in_no_table_of_optunas(study: Path) -> None:
    loaded = optuna.load_study(study_name="study", storage=f"sqlite:///{study}/study.db")
    printed = loaded.trials_dataframe(attrs=("number", "value", "params", "user_attrs", "state")).to_json()
    assert "step_seconds" in printed and "log_tail" not in printed
    assert "ds_tune" not in json.dumps(loaded.user_attrs)
