"""Records of earlier studies in the same storage, of the same training on the same hardware."""

import json
from collections.abc import Mapping
from typing import Any

import optuna

from ds_tune.objectives.trial import Provenance
from ds_tune.storage.identity import Identity, completed
from ds_tune.storage.records import TrialRecord
from ds_tune.storage.study_store import IDENTITY, StudyStore


def earlier_records(store: StudyStore, identity: Identity) -> list[TrialRecord]:
    """The finished trials of other studies whose figures are to be compared with this one's.

    Space, seed and memory cap may differ: a rate is what it is, and so is a peak. Only what was measured counts.
    """
    if identity.provenance is not Provenance.MEASURED:
        return []
    wanted = _comparable(identity.to_json())
    found: list[TrialRecord] = []
    for name in optuna.get_all_study_names(store.storage):
        if name == store.study.study_name:
            continue
        other = StudyStore(optuna.load_study(study_name=name, storage=store.storage), store.storage)
        stored = other.attributes.get(IDENTITY)
        if stored is not None and _comparable(completed(stored)) == wanted:
            found += other.records()
    return found


def _comparable(identity: Mapping[str, Any]) -> str:
    """Parts of an identity that must be the same in two studies, as text."""
    hardware = {key: value for key, value in identity["hardware"].items() if key != "memory_cap_bytes"}
    same = [identity["objective"], identity["workload"], hardware, identity["figures"]]
    return json.dumps(same, sort_keys=True)
