"""The Optuna study that keeps a tuning: opening, resuming, saving and telling.

Records live in the trials' system attributes and are saved before Optuna is told, so that a crash between the two
loses nothing: `recover` tells what was saved. User attributes are for people: short values with units in their names.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import sqlalchemy.engine
from optuna.distributions import BaseDistribution

from ds_tune.objectives.cost_model.forecast import Excluded
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.metric import METRICS, all_metrics, metric_context
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.trial import Failure, Measurement, Provenance, TrialConfig
from ds_tune.objectives.workload.kinds import workload_from_json
from ds_tune.storage.ablations import Contributions
from ds_tune.storage.attributes import record_of, save_record, set_study_attribute, study_attributes
from ds_tune.storage.database import open_storage
from ds_tune.storage.identity import Identity, completed, differences
from ds_tune.storage.records import Source, StudySummary, TrialRecord, TrialState
from ds_tune.storage.urls import check_storage_url, masked

# What is stored with the study (`storage.attributes`), and a trial's source, a user attribute.
IDENTITY = "ds_tune:identity"
TARGET = "ds_tune:trials_total"
SECONDS = "ds_tune:tuning_seconds"
FINALS_SECONDS = "ds_tune:finals_seconds"
ENDED = "ds_tune:ended"
MORE = "ds_tune:more"
VERSIONS = "ds_tune:versions"
WINNER = "ds_tune:winner"
PROMOTED = "ds_tune:promoted"
VERIFICATION = "ds_tune:verification:"
EXCLUDED = "ds_tune:excluded"
NUMERICS = "ds_tune:numerics:"
CONTRIBUTIONS = "ds_tune:contributions"
SOURCE = "source"

# How far an out-of-memory trial is counted as over the limit: nobody knows what it would have needed.
OUT_OF_MEMORY_VIOLATION = 0.1

_OPTUNA_STATES = {
    TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
    TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
    TrialState.FAILED: optuna.trial.TrialState.FAIL,
}

MOST_DIFFERENCES = 4
"""Differences between two studies that are told: the first are of what is trained."""


class StudyStore:
    """One study in its storage."""

    def __init__(self, study: optuna.Study, storage: optuna.storages.RDBStorage) -> None:
        self.study = study
        self.storage = storage

    @classmethod
    def create_or_resume(
        cls,
        storage_url: str,
        name: str,
        identity: Identity,
        versions: Mapping[str, str],
        sampler: optuna.samplers.BaseSampler,
    ) -> "StudyStore":
        """Opens the study of this name, or begins it.

        Raises:
            UsageError: the storage cannot be opened, or holds under this name a study that measured something else.
        """
        storage = open_storage(storage_url)
        if name in optuna.get_all_study_names(storage):
            store = cls(optuna.load_study(study_name=name, storage=storage, sampler=sampler), storage)
            stored = store.attributes.get(IDENTITY)
            if stored is None and store.trials():
                # Without trials it may be one that a tuner was killed in the making of.
                raise UsageError(
                    f"{masked(storage_url)} holds a study {name} that ds-tune did not make; use `study=NAME`"
                )
            known = stored and completed(stored)
            found = differences(known, identity.to_json())
            if found and any(record.counts for record in store.records()):
                other = all(difference.startswith("metric ") for difference in found)
                has = "maximises another metric" if other else "measured something else"
                more = f"; and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
                raise UsageError(
                    f"study {name} {has} ({'; '.join(found[:MOST_DIFFERENCES])}{more}): repeat its command to go on "
                    "with it, or begin another one with `study=NAME` `results=DIR`"
                )
            if not found:
                store._set(VERSIONS, dict(versions))
                return store
            # Nothing was learned under the old identity: the study begins anew under the corrected one.
            optuna.delete_study(study_name=name, storage=storage)
        direction = METRICS[identity.metric].direction
        study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, direction=direction)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([identity.provenance.mark(identity.metric)])
        store = cls(study, storage)
        study.set_user_attr("model", identity.workload.description)
        study.set_user_attr("hardware", identity.provenance.mark(identity.machine.description))
        store._set(VERSIONS, dict(versions))
        store._set(IDENTITY, identity.to_json())
        return store

    @classmethod
    def load(cls, storage_url: str, name: str | None) -> "StudyStore":
        """Opens a study to read it; without a name, the only one that is there. Nothing is changed by it.

        Raises:
            UsageError: there is no such study, or several and no name; or the storage cannot be opened.
        """
        check_storage_url(storage_url)
        database = sqlalchemy.engine.make_url(storage_url)
        if database.get_backend_name() == "sqlite" and not Path(database.database or "").exists():
            # To open it would make it.
            raise UsageError(f"`storage={masked(storage_url)}`: there is no such file")
        storage = open_storage(storage_url, reading=True)
        names = optuna.get_all_study_names(storage)
        if name is None and len(names) == 1:
            name = names[0]
        if name is None or name not in names:
            there = f"it holds {', '.join(names)}" if names else "it holds none"
            wanted = f"no study {name}" if name else "no single study"
            raise UsageError(f"{wanted} in {masked(storage_url)} ({there}); name one with `study`")
        store = cls(optuna.load_study(study_name=name, storage=storage), storage)
        if IDENTITY not in store.attributes:
            raise UsageError(f"study {name} in {masked(storage_url)} was not made by ds-tune")
        return store

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes that ds-tune stored with the study, by their keys; read from the storage each time."""
        return study_attributes(self.storage, self.study)

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of what the study measures; see `Identity.to_json`."""
        return completed(self.attributes[IDENTITY])

    def _set(self, key: str, value: Any) -> None:
        set_study_attribute(self.storage, self.study, key, value)

    @property
    def provenance(self) -> Provenance:
        """Kind of all of the study's figures."""
        return Provenance(self.identity["figures"])

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All of Optuna's trials, in their order. They are not copies: only to be read."""
        return self.study.get_trials(deepcopy=False)

    def ask(self, distributions: Mapping[str, BaseDistribution]) -> optuna.Trial:
        """The next trial: one that waits in the queue, or what the sampler proposes."""
        return self.study.ask(dict(distributions))

    def records(self) -> list[TrialRecord]:
        """All trials that ended, in their order. An interrupted one has no record."""
        ended = [trial for trial in self.trials() if trial.state.is_finished()]
        return [record for trial in ended if (record := record_of(trial)) is not None]

    def summary(self) -> StudySummary:
        attributes = self.attributes
        identity = completed(attributes[IDENTITY])
        return StudySummary(
            study=self.study.study_name,
            workload=workload_from_json(identity["workload"]),
            machine=Machine.from_json(identity["hardware"]),
            provenance=Provenance(identity["figures"]),
            metric=identity["metric"],
            versions=attributes[VERSIONS],
            trials_total=attributes.get(TARGET, 0),
            tuning_seconds=attributes.get(SECONDS, 0.0),
            finals_seconds=attributes.get(FINALS_SECONDS),
            ended=attributes.get(ENDED),
            records=self.records(),
            verification={
                key.removeprefix(VERIFICATION): [Measurement.from_json(run) for run in json.loads(value)]
                for key, value in attributes.items()
                if key.startswith(VERIFICATION)
            },
            winner=(attributes.get(WINNER) or {}).get("name"),
            tied=(attributes.get(WINNER) or {}).get("tied", ()),
            unsettled=(attributes.get(WINNER) or {}).get("unsettled", ()),
            promoted=attributes.get(PROMOTED, ()),
            numerics={
                key.removeprefix(NUMERICS): _numerics_from_json(json.loads(value))
                for key, value in attributes.items()
                if key.startswith(NUMERICS)
            },
            contributions=Contributions.from_json(json.loads(attributes[CONTRIBUTIONS]))
            if CONTRIBUTIONS in attributes
            else None,
            excluded=[Excluded.from_json(each) for each in json.loads(attributes.get(EXCLUDED, "[]"))],
        )

    def set_target(self, trials: int, *, afresh: bool = False) -> None:
        """How many finished trials the study is to have; what ended it before is forgotten, `afresh` in any case."""
        if afresh or self.attributes.get(TARGET) != trials:
            self._set(TARGET, trials)
            self._set(ENDED, None)
            self._set(WINNER, None)

    @property
    def more_pending(self) -> bool:
        """Whether more trials were asked for and its end not yet seen by the person who asked for it."""
        return bool(self.attributes.get(MORE))

    def set_more_pending(self, pending: bool) -> None:
        if pending != self.more_pending:
            self._set(MORE, pending)

    def add_verification(self, name: str, run: Measurement) -> None:
        """Stores one more run of a finalist. A finished trial's attributes are closed, so the study's hold it."""
        key = f"{VERIFICATION}{name}"
        runs = json.loads(self.attributes.get(key, "[]"))
        self._set(key, json.dumps([*runs, run.to_json()]))

    def set_winner(self, name: str, tied: Sequence[str], unsettled: Sequence[str]) -> None:
        """Stores the verification's verdict; see `StudySummary`."""
        self._set(WINNER, {"name": name, "tied": list(tied), "unsettled": list(unsettled)})

    def forget_winner(self) -> None:
        """Has the verification go on: there is one more finalist."""
        self._set(WINNER, None)

    def promote(self, name: str) -> None:
        """Makes a trial of the search a finalist, for it beat the winner as its ablation."""
        self._set(PROMOTED, [*self.attributes.get(PROMOTED, ()), name])

    def set_numerics(self, name: str, found: NumericsCheck | str) -> None:
        """Stores what a finalist's losses showed, or why they could not be compared."""
        document = {"unchecked": found} if isinstance(found, str) else found.to_json()
        self._set(f"{NUMERICS}{name}", json.dumps(document))

    def set_contributions(self, found: Contributions) -> None:
        """Stores what each setting of the winner brings."""
        self._set(CONTRIBUTIONS, json.dumps(found.to_json()))

    def importances(self) -> dict[str, float]:
        """Optuna's share of each parameter in the differences of throughput, the largest first; empty if it has none.

        Its evaluators need some complete trials that differ.
        """
        try:
            return optuna.importance.get_param_importances(self.study)
        except (ValueError, RuntimeError):
            return {}

    def set_excluded(self, excluded: Sequence[Excluded]) -> None:
        """Stores the configurations that were not launched because they certainly do not fit."""
        self._set(EXCLUDED, json.dumps([each.to_json() for each in excluded]))

    def set_ended(self, reason: str) -> None:
        self._set(ENDED, reason)

    def add_seconds(self, seconds: float) -> None:
        """Adds to the time that tuners spent on the search."""
        self._set(SECONDS, self.attributes.get(SECONDS, 0.0) + seconds)

    def add_finals_seconds(self, seconds: float) -> None:
        """Adds to the time spent after the search."""
        self._set(FINALS_SECONDS, self.attributes.get(FINALS_SECONDS, 0.0) + seconds)

    def enqueue(self, params: Mapping[str, Any], source: Source) -> None:
        """Has the next `ask` propose these parameters; asking twice for the same changes nothing."""
        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]):
            if trial.system_attrs.get("fixed_params") == dict(params):
                return
        self.study.enqueue_trial(dict(params), user_attrs={SOURCE: source.value})

    def begin(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], source: Source
    ) -> optuna.Trial:
        """A running trial of these parameters, whatever waits in the queue."""
        frozen = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={SOURCE: source.value},
        )
        return optuna.Trial(self.study, self.storage.create_new_trial(self.study._study_id, template_trial=frozen))

    def has_waiting(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]))

    def save(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Stores the record; from here on the trial is not lost, whatever happens before `tell`."""
        save_record(self.storage, trial, record)

    def tell(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Ends the trial in Optuna: its value, its constraint and its attributes.

        May be called again after a crash in its middle.
        """
        told = self.storage.get_trial(trial._trial_id)
        identity, told_value = self.identity, None
        provenance = Provenance(identity["figures"])
        match record.outcome:
            case Measurement() as measured:
                workload = workload_from_json(identity["workload"])
                context = metric_context(workload, record.machine, measured.flops_per_sample)
                metrics = all_metrics(measured.samples_per_second, context)
                rate = metrics[identity["metric"]]
                assert rate is not None, "a metric without a value is refused before the study begins"
                told_value = rate if record.state is TrialState.COMPLETE else None
                factor = rate / measured.samples_per_second
                samples = record.config.global_batch_size(record.machine.ranks)
                for step, seconds in enumerate(measured.step_seconds, start=1):
                    if step not in told.intermediate_values:
                        trial.report(factor * samples / seconds, step)
                low, high = measured.samples_per_second_ci95
                attributes: dict[str, Any] = {
                    **{name: each for name, each in metrics.items() if each is not None},
                    "samples_per_second_ci95_low": low,
                    "samples_per_second_ci95_high": high,
                    "peak_memory_gib": round(measured.peak_memory_bytes / GIB, 3),
                    "step_seconds": sum(measured.step_seconds) / len(measured.step_seconds),
                    "wall_seconds": round(measured.wall_seconds, 2),
                }
                violation = measured.peak_memory_bytes / record.machine.capacity_bytes - 1
            case Failure() as failure:
                attributes = {"wall_seconds": round(failure.wall_seconds, 2)}
                if failure.peak_memory_bytes is not None:
                    attributes["peak_memory_gib"] = round(failure.peak_memory_bytes / GIB, 3)
                violation = OUT_OF_MEMORY_VIOLATION
        if record.reason is not None:
            attributes["reason"] = record.reason
        if provenance is not Provenance.MEASURED:
            attributes["figures"] = provenance.value
        for key, value in {"name": record.config.name, **attributes}.items():
            trial.set_user_attr(key, value)
        if record.state is not TrialState.FAILED and "constraints" not in told.system_attrs:
            fits = isinstance(record.outcome, Measurement)
            self._constrain(trial, min(violation, 0.0) if fits else violation)
        self.study.tell(trial.number, told_value, state=_OPTUNA_STATES[record.state], skip_if_finished=True)

    def _constrain(self, trial: optuna.Trial, violation: float) -> None:
        # Last before tell: a retried trial would copy it. The list is what optuna-dashboard reads, and is written
        # second, so that where it stands both do.
        if "constraints:memory" not in self.storage.get_trial_system_attrs(trial._trial_id):
            trial.set_constraint("memory", violation)
        self.storage.set_trial_system_attr(trial._trial_id, "constraints", [violation])

    def recover(self, config_of: Callable[[optuna.trial.FrozenTrial], TrialConfig | None]) -> Sequence[str]:
        """Puts right what a killed tuner left: tells what was saved, and has the interrupted trial run again.

        Call it while holding the study's lock.

        Args:
            config_of: the configuration of an interrupted trial, or None if it was killed before it had one.

        Returns:
            The names of the configurations that will run again.
        """
        again = []
        for frozen in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            trial = optuna.Trial(self.study, frozen._trial_id)
            saved = record_of(frozen)
            if saved is not None:
                self.tell(trial, saved)
                continue
            config = config_of(frozen)
            # An ablation is found again by the winner's own.
            if config is not None and frozen.user_attrs.get(SOURCE) != Source.ABLATION.value:
                source = Source(frozen.user_attrs.get(SOURCE, Source.RETRY.value))
                # One that was queued may have been stopped before it had taken over all of its parameters.
                params = frozen.system_attrs.get("fixed_params", frozen.params)
                self.enqueue(params, Source.BASELINE if source is Source.BASELINE else Source.RETRY)
                again.append(config.name)
            self.interrupt(trial)
        return again

    def interrupt(self, trial: optuna.Trial) -> None:
        """Ends a trial that was stopped from outside; it has no record and counts for nothing."""
        trial.set_user_attr("reason", "interrupted")
        optuna_dashboard.save_note(trial, "Interrupted: it measured nothing and counts for nothing.")
        self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _numerics_from_json(document: Mapping[str, Any]) -> NumericsCheck | str:
    return str(document["unchecked"]) if "unchecked" in document else NumericsCheck.from_json(document)
