"""Where a study keeps what ds-tune knows of it: Optuna's system attributes, which no page or table of Optuna's prints.

Earlier studies kept the same in user attributes; they are read as before.
"""

import json
from typing import Any

import optuna

from ds_tune.storage.records import TrialRecord

PREFIX = "ds_tune:"
RECORD = "ds_tune:record"
USER_RECORD = "record"
"""The user attribute that held the record in earlier studies."""


def record_of(trial: optuna.trial.FrozenTrial) -> TrialRecord | None:
    """The record saved with a trial; None for one that was interrupted, or that another program made."""
    saved = trial.system_attrs.get(RECORD, trial.user_attrs.get(USER_RECORD))
    return None if saved is None else TrialRecord.from_json(json.loads(saved))


def save_record(storage: optuna.storages.BaseStorage, trial: optuna.Trial, record: TrialRecord) -> None:
    """Stores the record of a trial that has not been told yet."""
    storage.set_trial_system_attr(trial._trial_id, RECORD, json.dumps(record.to_json()))


def study_attributes(storage: optuna.storages.BaseStorage, study: optuna.Study) -> dict[str, Any]:
    """Attributes that ds-tune stored with a study, by their keys; empty for a study of another program."""
    held = {**study.user_attrs, **storage.get_study_system_attrs(study._study_id)}
    return {key: value for key, value in held.items() if key.startswith(PREFIX)}


def set_study_attribute(storage: optuna.storages.BaseStorage, study: optuna.Study, key: str, value: Any) -> None:
    """Stores something JSON can hold with a study, in place of what was there under the key."""
    storage.set_study_system_attr(study._study_id, key, value)
