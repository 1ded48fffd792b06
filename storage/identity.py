"""Identity of what a study measures, and how two of them differ."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import optuna

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.metric import DEFAULT_METRIC
from ds_tune.objectives.trial import Provenance
from ds_tune.objectives.workload.kinds import Workload, workload_from_json

# A study from before there were other figures than measured ones, or other metrics, does not name them.
_DEFAULTS = {"figures": Provenance.MEASURED.value, "metric": DEFAULT_METRIC}


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored identity, with what studies of earlier versions leave out; as JSON has it, with lists for tuples."""
    workload = json.loads(json.dumps(workload_from_json(stored["workload"]).to_json()))
    return {**_DEFAULTS, **stored, "workload": workload}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Conditions that make measurements comparable: a study holds trials of one of these only."""

    objective: str
    workload: Workload
    machine: Machine
    space: Mapping[str, Any]
    provenance: Provenance = Provenance.MEASURED
    recording: str | None = None
    """Which recording is replayed, where one is."""
    metric: str = DEFAULT_METRIC
    """Name of the metric that Optuna is told, one of `METRICS`."""

    def to_json(self) -> dict[str, Any]:
        """Returns it as it will come back from the storage, lists for tuples, so that the two can be compared."""
        hardware = self.machine.to_json()
        hardware.pop("visible_devices", None)
        document: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "objective": self.objective,
                    "workload": self.workload.to_json(),
                    "hardware": hardware,
                    "space": dict(self.space),
                    "figures": self.provenance.value,
                    "recording": self.recording,
                    "metric": self.metric,
                }
            )
        )
        return document


def differences(stored: Any, present: Any, path: str = "") -> list[str]:
    """Where two JSON documents differ, each as `key: was … now …`, outermost first."""
    if isinstance(stored, Mapping) and isinstance(present, Mapping):
        found = []
        for key in [*stored, *(key for key in present if key not in stored)]:
            found += differences(stored.get(key), present.get(key), f"{path} {key}".strip())
        return found
    return [] if stored == present else [f"{path} {_shown(stored)} there, {_shown(present)} here"]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith('{"name": '):
        return _values_words(value)
    return "none" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)


def _values_words(text: str) -> str:
    """The values of a dimension of a space, which is stored as Optuna writes it."""
    match optuna.distributions.json_to_distribution(text):
        case optuna.distributions.IntDistribution(low=low, high=high):
            return f"{low} to {high}"
        case optuna.distributions.CategoricalDistribution(choices=choices):
            return " or ".join(map(str, choices))
        case other:
            return str(other)
