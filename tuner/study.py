"""The loop of a study: ask -> run -> save -> tell, from wherever an earlier run left it."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

import optuna

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.prior import FlatPrior, Prior
from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.machine import software_versions
from ds_tune.objectives.objective import Objective
from ds_tune.objectives.trial import Failure, FailureKind, TrialConfig
from ds_tune.storage.earlier import earlier_records
from ds_tune.storage.identity import Identity
from ds_tune.storage.lock import StudyLock
from ds_tune.storage.ownership import check_owner, claim
from ds_tune.storage.records import Source, StudySummary, TrialRecord, TrialState
from ds_tune.storage.study_store import SOURCE, StudyStore
from ds_tune.tuner.enqueued import put_right
from ds_tune.tuner.finals import Finals, Verification
from ds_tune.tuner.observer import Observer
from ds_tune.tuner.reports.export import write_trial_inputs
from ds_tune.tuner.reports.notes import publish, save_trial_note
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.sampler import OWN, SpaceSampler, make_sampler, unvisited
from ds_tune.tuner.spec import StudySpec
from ds_tune.tuner.stages import stages_left_out
from ds_tune.tuner.stopping import StopSignals

MAX_FAILURES_IN_A_ROW = 3
"""Crashes and timeouts say nothing about a configuration; so many of them say something about the machine."""

FEWEST_WITH_UNTUNED = 4
"""Trials of a study that compares with untuned training beside a person's own configuration."""

OBJECTIVE = "samples_per_second, end to end"


class Study:
    """One run of the tuner on one study."""

    def __init__(
        self,
        spec: StudySpec,
        sampler: SpaceSampler,
        objective: Objective,
        verification: Verification | None,
        observer: Observer,
        stop: StopSignals,
    ) -> None:
        """
        Args:
            verification: who runs the finalists again; None where there is nothing to run: the best is then the winner
                of the search.
        """
        self._spec = spec
        self._objective = objective
        self._verification = verification
        self._observer = observer
        self._stop = stop
        self._space = spec.space
        self._sampler = sampler
        versions = spec.backend.versions
        self._versions = software_versions() if versions is None else versions

    def run(self) -> StudySummary:
        """Goes on until the study has its trials, is exhausted, or is told to stop.

        Raises:
            UsageError: the study, its storage or its workload cannot be used as asked.
            EnvironmentFault: trials fail for reasons that no configuration can mend.
            StopNow: told to stop at once; everything finished is stored.
        """
        spec, request = self._spec, self._spec.request
        check_owner(spec.results, request.study, spec.storage_url)
        with StudyLock(spec.storage_url, request.study):
            identity = Identity(
                objective=OBJECTIVE,
                workload=spec.backend.workload,
                machine=spec.backend.machine,
                space=self._space.to_json(),
                provenance=self._objective.provenance,
                recording=spec.backend.recording,
                metric=request.metric,
            )
            store = StudyStore.create_or_resume(
                spec.storage_url, request.study, identity, self._versions, self._sampler
            )
            # Not before: a storage that turned out to be of no use owns nothing.
            claim(spec.results, request.study, spec.storage_url)
            spec.backend.keep(spec.results)
            self._sampler.learn_from(earlier_records(store, identity))
            again = store.recover(self._space.config_of)
            begins_more = request.more is not None and not store.more_pending
            store.set_target(self._target(store.summary(), more_pending=store.more_pending), afresh=begins_more)
            if request.more is not None:
                store.set_more_pending(True)
            self._observer.study_opened(store.summary(), again)
            try:
                self._run_trials(store)
            finally:
                self._objective.close()
            store.set_excluded(self._sampler.excluded(store.trials()))
            if request.verify and self._verification is not None:
                Finals(store, spec.results, self._verification, self._observer, self._stop, self._space).run()
            summary = store.summary()
            publish(store.study, Report.of(summary))
            return summary

    def _target(self, summary: StudySummary, *, more_pending: bool) -> int:
        """The total of finished trials to reach.

        `more` adds to a study that reached its total; on an unfinished one it only goes on, so that repeating an
        interrupted request does not add twice.
        """
        if self._spec.request.more is None:
            return max(self._spec.request.trials, summary.finished_trials)
        unfinished = summary.finished_trials < summary.trials_total and summary.ended is None
        if unfinished or more_pending:
            return summary.trials_total
        return summary.finished_trials + self._spec.request.more

    def _run_trials(self, store: StudyStore) -> None:
        clock = time.monotonic()
        failures_in_a_row = 0
        left_out = stages_left_out(self._space, store.trials())
        prepared = False
        while not self._stop.requested:
            summary = store.summary()
            if summary.finished_trials >= summary.trials_total or summary.ended is not None:
                return
            put_right(store, self._space, self._observer.say)
            ended = self._queue_baseline(store, summary) or self._exhausted(store) or self._settled(store)
            if ended is not None:
                store.set_ended(ended)
                return
            if not prepared:
                # As late as this, so that a finished study starts no process, and before the first trial is asked
                # for, so that a machine that cannot run any leaves none behind.
                self._objective.prepare(self._space.legal)
                prepared = True
            record = self._run_trial(store, summary)
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            store.add_seconds(elapsed)
            self._observer.trial_finished(record, store.summary())
            known, left_out = left_out, stages_left_out(self._space, store.trials())
            for stage in left_out.keys() - known.keys():
                self._observer.say(f"Stage {stage} left out: {left_out[stage].removesuffix('.')}.")
            if record.state is not TrialState.FAILED:
                failures_in_a_row = 0
            elif record.config.zero_stage not in left_out:
                failures_in_a_row += 1
            is_everywhere = left_out.keys() >= {config.zero_stage for config in self._space.legal}
            check_failure(record, failures_in_a_row, own=self._space.own, is_everywhere=is_everywhere)

    def _run_trial(self, store: StudyStore, summary: StudySummary) -> TrialRecord:
        spec, machine = self._spec, self._spec.backend.machine
        before = store.trials()
        trial = store.ask(self._space.distributions)
        config = TrialConfig(**trial.params)
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        folder = spec.results.trial(config)
        write_trial_inputs(folder, config, spec.backend.workload, machine)
        self._observer.trial_started(trial.number, config, summary)
        source = Source(trial.user_attrs.get(SOURCE, Source.SEARCH.value))
        best = summary.best
        outcome = self._objective.run(
            config,
            folder,
            self._observer.phase,
            best_samples_per_second=best.samples_per_second if best and source is not Source.BASELINE else None,
        )
        record = TrialRecord(
            number=trial.number,
            config=config,
            outcome=outcome,
            source=source,
            started_at=started_at,
            machine=machine,
            versions=self._versions,
            forecast=self._sampler.forecast(config, before),
        )
        store.save(trial, record)
        store.tell(trial, record)
        save_trial_note(store.study, record, store.provenance)
        return record

    def _queue_baseline(self, store: StudyStore, summary: StudySummary) -> str | None:
        """Has the untuned configuration, or the smallest one that fits, run before anything is searched.

        Returns:
            Why there is nothing to search, if not even the smallest configuration fits.
        """
        if store.has_waiting():
            return None
        if summary.baseline is not None:
            self._queue_untuned(store, summary)
            return None
        tried = {record.config.name: record for record in summary.records}
        left_out = stages_left_out(self._space, store.trials())
        for config in self._sampler.baselines(store.trials()):
            if config.zero_stage in left_out:
                continue
            record = tried.get(config.name)
            if record is None:
                store.enqueue(self._space.params(config), Source.BASELINE)
                return None
            if record.state is TrialState.COMPLETE:
                return None
        known = [tried[config.name] for config in self._space.baselines if config.name in tried]
        if any(record.state is TrialState.FAILED for record in known):
            return None  # a crash says nothing about memory
        smallest = "one sample a rank" if self._space.restricted_to is None else "the smallest configuration there is"
        core = self._space.restricted_to is None and self._spec.request.preset in (None, "core")
        hint = "; `preset=speed` also searches what saves memory" if core and not self._spec.notes else ""
        if self._spec.hint is not None:
            hint = f"; {self._spec.hint}"
        return f"not even {smallest} fits, in any ZeRO stage{hint}"

    def _queue_untuned(self, store: StudyStore, summary: StudySummary) -> None:
        """Has untuned training run beside a person's own configuration, where trials are left for a search."""
        untuned = self._space.untuned
        names = {record.config.name for record in summary.records}
        if untuned is None or untuned.name in names or summary.trials_total < FEWEST_WITH_UNTUNED:
            return
        left_out = stages_left_out(self._space, store.trials())
        if untuned.zero_stage not in left_out and untuned in self._sampler.baselines(store.trials()):
            store.enqueue(self._space.params(untuned), Source.BASELINE)

    def _settled(self, store: StudyStore) -> str | None:
        """Why no further trial is worth its time; None to go on, and where trials were asked for by `more`."""
        if store.has_waiting() or self._spec.request.more is not None:
            return None
        return self._sampler.settled(store.trials())

    def _exhausted(self, store: StudyStore) -> str | None:
        if store.has_waiting() or unvisited(self._space, store.trials()):
            return None
        return "every configuration of the space has been tried"


def check_failure(
    record: TrialRecord, failures_in_a_row: int, *, own: TrialConfig | None = None, is_everywhere: bool = False
) -> None:
    """Ends a study whose trials fail for reasons that searching on cannot mend.

    Args:
        own: the configuration that a person trains with today.
        is_everywhere: no ZeRO stage is left at which anything could be tried.

    Raises:
        UsageError: DeepSpeed refused the configuration at every stage, or a script's at its own; as only the user's own
            file can be at fault, all would be.
        EnvironmentFault: too many trials in a row crashed or hung.
    """
    if not isinstance(record.outcome, Failure):
        return
    is_of_script = own is not None and record.config.zero_stage == own.zero_stage and bool(record.outcome.raised)
    is_over = is_of_script or is_everywhere or failures_in_a_row >= MAX_FAILURES_IN_A_ROW
    if record.outcome.kind is FailureKind.INVALID_CONFIG and is_over:
        raise UsageError(f"DeepSpeed refuses the configuration, correct `ds_config`: {record.outcome.message}")
    if failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
        raise EnvironmentFault(
            f"the last {failures_in_a_row} trials failed, the last one with {record.reason}; "
            f"what it wrote last:\n{record.outcome.log_tail}"
        )


def run_study(spec: StudySpec, observer: Observer, stop: StopSignals) -> StudySummary:
    """Runs or resumes the study of a spec.

    Raises:
        UsageError, EnvironmentFault, StopNow: see `Study.run`.
    """
    for line in (*spec.backend.notes, *spec.notes):
        observer.say(line)
    sampler = _sampler_of(spec, observer.say)
    with contextlib.ExitStack() as resources:
        objective, verification = spec.backend.objectives(spec.results, observer.say, resources)
        return Study(spec, sampler, objective, verification, observer, stop).run()


def _sampler_of(spec: StudySpec, notice: Callable[[str], None]) -> SpaceSampler:
    """The sampler asked for; of a model whose sizes are not known it believes nothing yet."""
    request, backend = spec.request, spec.backend
    if request.sampler == OWN:
        hardware = hardware_of(backend.machine)
        prior: Prior
        try:
            prior = CostModel(backend.workload, hardware)
        except UsageError as error:
            notice(f"Searching without predictions: {error}")
            prior = FlatPrior(hardware)
        return make_sampler(OWN, spec.space, request.seed, prior)
    return make_sampler(request.sampler, spec.space, request.seed, None)


@contextlib.contextmanager
def optuna_silenced() -> Iterator[None]:
    """Keeps Optuna's lines out of a program that uses Optuna itself, and then has them as they were."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def quiet_optuna() -> None:
    """Leaves the terminal to ds-tune's own lines."""
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # without a handler, Python prints warnings by itself
