"""Runs of a comparison, kept in one file of its folder that is whole at any moment, so that it can go on after any end.

The studies of ds-tune's rows keep their own trials, in folders beside it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.trial import Measurement, Outcome, TrialConfig, outcome_from_json
from ds_tune.storage.identity import differences
from ds_tune.tuner.comparison.rows import Batch, Row

SWEPT, VERIFIED, BATCH, FAULTS = "swept", "verified", "one_batch", "faults"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """One run of a sweep."""

    config: TrialConfig
    outcome: Outcome
    seconds: float
    """Wall clock of the run, processes started for it included."""


class Ledger:
    """Everything that ran for a comparison, by model."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        """
        Args:
            asked: what makes figures comparable: hardware, training, limits.

        Raises:
            UsageError: the file is of another comparison, or of no one's.
        """
        self._path = path
        present = json.loads(json.dumps(asked))
        self._document: dict[str, Any] = {"asked": present, "models": {}}
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text())
            there = stored["asked"]
            models = dict(stored["models"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a comparison of ds-tune; name another folder with `results`") from None
        if models and (found := differences(there, present)):
            raise UsageError(
                f"{path.parent} holds another comparison ({'; '.join(found)}): repeat its command to go on with it, or "
                "name another folder with `results`"
            )
        self._document["models"] = models

    @property
    def models(self) -> list[str]:
        """Names of the models that something ran for, in the order in which they were begun."""
        return list(self._document["models"])

    def swept(self, model: str, row: Row) -> dict[str, Swept]:
        """Runs of a row's sweeps, by the configuration's name."""
        found = self._of(model)[SWEPT].get(row.value, {})
        return {
            name: Swept(
                config=TrialConfig.from_json(run["config"]),
                outcome=outcome_from_json(run["outcome"]),
                seconds=run["seconds"],
            )
            for name, run in found.items()
        }

    def add_swept(self, model: str, row: Row, run: Swept) -> None:
        """Stores one run of a sweep."""
        runs = self._of(model)[SWEPT].setdefault(row.value, {})
        runs[run.config.name] = {
            "config": run.config.to_json(),
            "outcome": run.outcome.to_json(),
            "seconds": round(run.seconds, 3),
        }
        self._write()

    def one_batch(self, model: str) -> int | None:
        """The global batch of the table at one; None as long as it is not known."""
        found = self._of(model)[BATCH]
        return None if found is None else int(found)

    def set_one_batch(self, model: str, samples: int) -> None:
        """Fixes the global batch of the table at one."""
        self._of(model)[BATCH] = samples
        self._write()

    def fault(self, model: str, row: Row, batch: Batch) -> str | None:
        """Why a row's study could not go on when it was last tried; None where it could."""
        found = self._of(model).get(FAULTS, {}).get(f"{row.value}/{batch.value}")
        return None if found is None else str(found)

    def set_fault(self, model: str, row: Row, batch: Batch, fault: str | None) -> None:
        """Stores why a row's study cannot go on, or that it can."""
        if fault != self.fault(model, row, batch):
            self._of(model).setdefault(FAULTS, {})[f"{row.value}/{batch.value}"] = fault
            self._write()

    def verified(self, model: str) -> dict[str, dict[int, Outcome]]:
        """Runs in fresh processes: by the choice's key, then by round."""
        return {
            key: {int(turn): outcome_from_json(outcome) for turn, outcome in rounds.items()}
            for key, rounds in self._of(model)[VERIFIED].items()
        }

    def add_verified(self, model: str, key: str, turn: int, outcome: Outcome) -> None:
        """Stores one run in fresh processes."""
        self._of(model)[VERIFIED].setdefault(key, {})[str(turn)] = outcome.to_json()
        self._write()

    def measured(self, model: str, key: str) -> list[Measurement]:
        """Measurements of a choice in fresh processes, by round."""
        rounds = self.verified(model).get(key, {})
        return [outcome for _, outcome in sorted(rounds.items()) if isinstance(outcome, Measurement)]

    def _of(self, model: str) -> dict[str, Any]:
        empty: dict[str, Any] = {SWEPT: {}, BATCH: None, VERIFIED: {}, FAULTS: {}}
        found: dict[str, Any] = self._document["models"].setdefault(model, empty)
        return found

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._document, indent=1) + "\n")
