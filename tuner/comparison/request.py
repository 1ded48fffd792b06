"""Request for a comparison."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.tuner.backend import Backend, measured
from ds_tune.tuner.comparison.rows import Batch, Row
from ds_tune.tuner.request import TuneRequest, check_count

DEFAULT_COMPARISON = "comparison"
"""Name of the results folder."""

DEFAULT_ROUNDS = 3
DEFAULT_SPEED_TRIALS = 20
"""As many as the wider space takes; a study ends before when nothing is left to gain."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What to compare, and how closely."""

    models: tuple[str, ...]
    """Empty for the device's default."""
    request: TuneRequest
    """Request for the studies of ds-tune's core rows, less the model; its results folder is the comparison's."""
    global_batch: int | None = None
    """Global batch of the second table; None for that of the row that is tuned by hand."""
    speed_trials: int = DEFAULT_SPEED_TRIALS
    rounds: int = DEFAULT_ROUNDS
    """Runs of each choice in fresh processes."""
    free_only: bool = False
    """Leave out the table at one global batch."""

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a field has a value that it cannot have.
        """
        check_count("rounds", self.rounds)
        check_count("speed_trials", self.speed_trials)
        check_count("global_batch", self.global_batch)
        if self.free_only and self.global_batch is not None:
            raise UsageError("`global_batch` is of the second table, which `free_only` leaves out; leave out one")
        if len(set(self.models)) < len(self.models):
            raise UsageError("a model is named twice; name each once")
        check_folders(self.models)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Tables of the comparison."""
        return (Batch.FREE,) if self.free_only else (Batch.FREE, Batch.ONE)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows of the comparison; the person's own only where there is a configuration."""
        return tuple(row for row in Row if row is not Row.OWN or self.request.ds_config is not None)

    def of_models(self, models: tuple[str, ...]) -> "CompareRequest":
        """The same request for these models."""
        return dataclasses.replace(self, models=models)

    def backend_of(self, model: str, say: Callable[[str], None]) -> Backend:
        """Machine and training of a model, whose global batch is free.

        Args:
            say: told in one line what takes a while.

        Raises:
            UsageError: it cannot be trained as asked.
        """
        return measured(self._of_model(model), say)

    def _of_model(self, model: str) -> TuneRequest:
        # A person's own configuration holds its global batch unless told otherwise: the first table lets it go.
        return dataclasses.replace(self.request, model=model, free_batch=self.request.ds_config is not None)

    def asked(self, backend: Backend) -> dict[str, Any]:
        """What makes the figures of a comparison comparable, less the models; more trials, rounds and models may be
        asked for later."""
        workload = backend.workload.to_json()
        return {
            "hardware": backend.machine.to_json(),
            "training": {key: value for key, value in workload.items() if key not in ("model", "data")},
            "limits": {
                "max_micro_batch": backend.limits.max_micro_batch,
                "max_global_batch": backend.limits.max_global_batch,
                "global_batch": self.global_batch,
            },
        }

    def study(self, model: str, row: Row, batch: Batch, global_batch: int | None) -> TuneRequest:
        """The request for the study of one of ds-tune's rows."""
        at_one = batch is Batch.ONE
        return dataclasses.replace(
            self._of_model(model),
            preset=row.value,
            trials=self.speed_trials if row is Row.SPEED else self.request.trials,
            global_batch=global_batch if at_one else None,
            free_batch=self.request.ds_config is not None and not at_one,
            max_global_batch=None if at_one else self.request.max_global_batch,
            results=self.folder(model, row, batch),
        )

    def folder(self, model: str, row: Row, batch: Batch = Batch.FREE) -> Path:
        """Folder of a row's search; sweeps have one for both tables."""
        name = f"{row.value}_one_batch" if row.is_study and batch is Batch.ONE else row.value
        return self.request.results / model_folder(model) / name


def model_folder(model: str) -> str:
    """Name of a model's folder: the last part of its path or hub id, without what a file system may not like."""
    return re.sub(r"[^\w.-]", "_", Path(model).name).lstrip(".") or "model"


def check_folders(models: Sequence[str]) -> None:
    """
    Raises:
        UsageError: two models would have one folder.
    """
    folders = [model_folder(model) for model in models]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"two models would be in one folder, {folder}; compare them in folders of their own")
