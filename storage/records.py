"""Record of a trial (`TrialRecord`) and summary of a study (`StudySummary`)."""

import dataclasses
import enum
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from ds_tune.objectives.cost_model.forecast import Excluded, Forecast
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.metric import DEFAULT_METRIC
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.trial import (
    Failure,
    FailureKind,
    Measurement,
    Outcome,
    Provenance,
    TrialConfig,
    outcome_from_json,
)
from ds_tune.objectives.words import counted
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.storage.ablations import Contributions
from ds_tune.storage.finalists import (
    Finalist,
    Speedup,
    VerifiedRate,
    disturbed_run_noise,
    is_busy,
    step_spread,
    verified_rate,
)
from ds_tune.storage.verdict import Verdict, candidates, contenders, judge

RECORD_VERSION = 1


class TrialState(enum.StrEnum):
    """How a trial ended, as Optuna counts it."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"


class Source(enum.StrEnum):
    """Origin of a proposed configuration."""

    BASELINE = "baseline"
    SEARCH = "search"
    RETRY = "retry"
    """The configuration of a trial that was running when the tuner was stopped."""
    ABLATION = "ablation"
    """After the search, one setting of the winner was changed, and that was faster."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """Everything known of one trial; what reports and exports are made from."""

    number: int
    config: TrialConfig
    outcome: Outcome
    source: Source
    started_at: str
    """ISO 8601, UTC."""
    machine: Machine
    versions: Mapping[str, str]
    forecast: Forecast | None = None
    """Forecast of the cost model just before the trial; None where another sampler searched."""

    @property
    def state(self) -> TrialState:
        """Out of memory says something about the configuration and prunes it; a crash or a timeout does not."""
        match self.outcome:
            case Measurement(stopped_early=True):
                return TrialState.PRUNED
            case Measurement():
                return TrialState.COMPLETE
            case Failure(kind=FailureKind.OUT_OF_MEMORY):
                return TrialState.PRUNED
            case _:
                return TrialState.FAILED

    @property
    def counts(self) -> bool:
        """Whether the trial is one of the trials that were asked for."""
        return self.state is not TrialState.FAILED and self.source is not Source.ABLATION

    @property
    def samples_per_second(self) -> float | None:
        return self.outcome.samples_per_second if isinstance(self.outcome, Measurement) else None

    @property
    def reason(self) -> str | None:
        """Why a trial is not complete, in one line; None for one that is."""
        if isinstance(self.outcome, Measurement):
            seen = counted(len(self.outcome.step_seconds), "step")
            parts = self.outcome.from_parts
            if micro_steps := parts.micro_steps if parts else self.outcome.from_micro_steps:
                seen = counted(micro_steps, "micro-step")
            return f"clearly slower than the best ({seen})" if self.outcome.stopped_early else None
        reason = f"{self.outcome.kind.value.replace('_', ' ')}: {self.outcome.message}"
        if self.outcome.kind is FailureKind.OUT_OF_MEMORY and self.outcome.peak_memory_bytes is not None:
            peak, capacity = self.outcome.peak_memory_bytes / GIB, self.machine.capacity_bytes / GIB
            reason = f"out of memory in {self.outcome.phase} (peak {peak:.2f} of {capacity:.2f} GiB)"
        return reason

    def to_json(self) -> dict[str, Any]:
        return {
            "version": RECORD_VERSION,
            "number": self.number,
            "config": self.config.to_json(),
            "outcome": self.outcome.to_json(),
            "source": self.source.value,
            "started_at": self.started_at,
            "machine": self.machine.to_json(),
            "versions": dict(self.versions),
            "forecast": self.forecast.to_json() if self.forecast else None,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """
        Raises:
            ValueError: the record is of a version that this ds-tune does not know.
        """
        if document["version"] != RECORD_VERSION:
            raise ValueError(f"a trial record of version {document['version']}; this ds-tune reads {RECORD_VERSION}")
        return cls(
            number=document["number"],
            config=TrialConfig.from_json(document["config"]),
            outcome=outcome_from_json(document["outcome"]),
            source=Source(document["source"]),
            started_at=document["started_at"],
            machine=Machine.from_json(document["machine"]),
            versions=document["versions"],
            forecast=Forecast.from_json(document["forecast"]) if document.get("forecast") else None,
        )


class StudyState(enum.StrEnum):
    """Where a study stands."""

    FINISHED = "finished"
    UNFINISHED = "unfinished"
    """Continued by the same command."""
    NOTHING_FITS = "nothing_fits"


class AfterSearch(enum.StrEnum):
    """Stage of what comes after the search."""

    NONE = "none"
    """The search goes on, or nobody asked for more than it."""
    VERIFICATION = "verification"
    """There is no winner yet, or its losses were not compared."""
    ABLATIONS = "ablations"
    """Contributions of the winner's settings were not measured."""
    DONE = "done"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudySummary:
    """A study as its records tell it; derived whenever it is needed, never stored."""

    study: str
    workload: Workload
    machine: Machine
    versions: Mapping[str, str]
    trials_total: int
    """Number of finished trials that the study was asked to reach."""
    tuning_seconds: float
    """Time that tuners spent on it, over all sessions, from the first trial's begin on."""
    finals_seconds: float | None = None
    """Time spent after the search, over all sessions: verification, comparison of losses, ablations. None where nothing
    of it was begun."""
    ended: str | None
    """Why the search stopped before `trials_total`, when it did and will not go on."""
    records: Sequence[TrialRecord]
    verification: Mapping[str, Sequence[Measurement]] = dataclasses.field(default_factory=dict)
    """Repeated runs in fresh processes, by the configuration's name."""
    provenance: Provenance = Provenance.MEASURED
    metric: str = DEFAULT_METRIC
    """Name of the metric that the study maximises, one of `METRICS`."""
    winner: str | None = None
    """The configuration that the verification found to be the best."""
    tied: Sequence[str] = ()
    """Configurations shown to be level with the winner, or with the fastest where the winner saves memory."""
    unsettled: Sequence[str] = ()
    """Configurations that the verification could not tell from the winner."""
    promoted: Sequence[str] = ()
    """Trials of the search that beat an earlier winner as its ablations, so that they are verified, too."""
    numerics: Mapping[str, NumericsCheck | str] = dataclasses.field(default_factory=dict)
    """Results of comparing the finalists' losses, or why they could not be compared, by the configuration's name."""
    contributions: Contributions | None = None
    """Contribution of each setting of the winner; None before it was measured."""
    excluded: Sequence[Excluded] = ()
    """Configurations that were not launched because they certainly do not fit."""

    @property
    def finished_trials(self) -> int:
        return sum(record.counts for record in self.records)

    @property
    def is_searched(self) -> bool:
        """Whether the search is over."""
        return self.finished_trials >= self.trials_total or self.ended is not None

    @property
    def state(self) -> StudyState:
        if not self.is_searched:
            return StudyState.UNFINISHED
        return StudyState.FINISHED if self.eligible else StudyState.NOTHING_FITS

    @property
    def after_search(self) -> AfterSearch:
        """Stage that is still to be done after the search, as far as it was begun."""
        begun = self.finals_seconds is not None or self.verification
        if self.state is not StudyState.FINISHED or not begun:
            return AfterSearch.NONE
        if self.winner is None or self.winner not in self.numerics:
            return AfterSearch.VERIFICATION
        explained = self.contributions is not None and self.contributions.winner == self.winner
        return AfterSearch.DONE if explained else AfterSearch.ABLATIONS

    @property
    def goes_on(self) -> bool:
        """Whether the same command has something left to do."""
        after = self.after_search not in (AfterSearch.NONE, AfterSearch.DONE)
        return after or self.state is StudyState.UNFINISHED

    @property
    def verdict(self) -> Verdict | None:
        """The verification's, or as long as that goes on, how the candidates rank so far; None before all of them have
        run again."""
        if self.winner is not None:
            return Verdict(leader=self.winner, level=tuple(self.tied), unsettled=tuple(self.unsettled))
        return self.verdict_without() if self.is_searched else None

    def verdict_without(self, failed: Collection[str] = ()) -> Verdict | None:
        """How the candidates rank by their runs so far.

        Args:
            failed: names of those that did not run again.
        """
        names = set(self.candidates) - set(failed)
        field = {name: each for name, each in self.field.items() if name in names}
        if not field or not all(each.runs for each in field.values()):
            return None
        return judge(field, self.machine.capacity_bytes, run_noise=self.run_noise)

    @property
    def best(self) -> TrialRecord | None:
        """The leader of the verification; before there is one, the trial with the highest figure."""
        if (verdict := self.verdict) is not None:
            for record in self.eligible:
                if record.config.name == verdict.leader:
                    return record
        if self.is_searched and self.verification:
            return max(self.eligible, key=self.rate, default=None)
        return self.fastest

    @property
    def finalists(self) -> dict[str, Finalist]:
        """Measurements of the configurations that ran again, by name; the baseline is one of them."""
        return {
            record.config.name: Finalist(record.outcome, runs)
            for record in self.records
            if isinstance(record.outcome, Measurement) and (runs := self.verification.get(record.config.name))
        }

    def verified(self, record: TrialRecord) -> VerifiedRate | None:
        """Rate of a trial's configuration by its verification runs; None without any.

        On a quiet machine how far the others' runs lie apart counts, but not the baseline's: launching decides there,
        which is its own.
        """
        finalists = self.finalists
        finalist = finalists.pop(record.config.name, None)
        if finalist is None:
            return None
        if self.baseline is not None:
            finalists.pop(self.baseline.config.name, None)
        return verified_rate(finalist, finalists.values(), run_noise=self.run_noise)

    @property
    def field(self) -> dict[str, Finalist]:
        """Measurements of the eligible trials by name, also of those that did not run again."""
        return {
            record.config.name: Finalist(record.outcome, self.verification.get(record.config.name, ()))
            for record in self.eligible
            if isinstance(record.outcome, Measurement)
        }

    @property
    def candidates(self) -> list[str]:
        """Names of the trials that may be the fastest, those that an ablation found among them."""
        found = {record.config.name for record in self.records if record.source is Source.ABLATION}
        return candidates(self.field, busy=self.disturbance is not None, promoted={*found, *self.promoted})

    @property
    def disturbance(self) -> float | None:
        """Relative difference between the slow and the fast steps of one configuration, where something else uses the
        machine; None on a quiet one."""
        field = self.field
        disturbed = [field[name] for name in contenders(field)]
        if self.provenance is not Provenance.MEASURED or not is_busy(disturbed):
            return None
        return max(step_spread(each.all_runs) for each in disturbed)

    @property
    def run_noise(self) -> float | None:
        """See `disturbed_run_noise`; None on a quiet machine, and where nothing ran again."""
        finalists = list(self.finalists.values())
        return disturbed_run_noise(finalists) if finalists and self.disturbance is not None else None

    def rate(self, record: TrialRecord) -> float:
        """Samples/s as verified; without verification runs, of the search; 0 for a trial without a measurement."""
        verified = self.verified(record)
        return verified.samples_per_second if verified is not None else record.samples_per_second or 0.0

    @property
    def verification_seconds(self) -> float:
        """Seconds that the verification took, which are no part of `tuning_seconds`."""
        return math.fsum(run.wall_seconds for runs in self.verification.values() for run in runs)

    @property
    def total_seconds(self) -> float:
        """Search and what came after it."""
        # Studies of earlier versions may have lost what a killed session had spent.
        return self.tuning_seconds + max(self.finals_seconds or 0.0, self.verification_seconds)

    @property
    def trial_seconds(self) -> float:
        """Seconds that all trials took by their own account, which for trials that were not run here are not
        `tuning_seconds`."""
        return math.fsum(record.outcome.wall_seconds for record in self.records)

    @property
    def fastest(self) -> TrialRecord | None:
        """The trial with the highest throughput in the search, of those that train what the baseline trains."""
        return max(self.eligible, key=lambda record: record.samples_per_second or -math.inf, default=None)

    @property
    def eligible(self) -> list[TrialRecord]:
        """The complete trials whose losses were not found to be others than the baseline's."""
        complete = [record for record in self.records if record.state is TrialState.COMPLETE]
        return [record for record in complete if self.numerics_fault(record) is None]

    def numerics_fault(self, record: TrialRecord) -> str | None:
        """Why a trial's configuration does not train what the baseline trains; None as far as is known."""
        found = self.numerics.get(record.config.name)
        return found.fault if isinstance(found, NumericsCheck) else None

    @property
    def baseline(self) -> TrialRecord | None:
        """The untuned configuration: ZeRO-0 with mbs 1, or the smallest that fits."""
        for record in self.records:
            if record.source is Source.BASELINE and record.state is TrialState.COMPLETE:
                return record
        return None

    @property
    def speedup(self) -> Speedup | None:
        """The best trial over the baseline, with its interval."""
        best, baseline = self.best, self.baseline
        if best is None or baseline is None:
            return None
        if best is baseline:
            return Speedup(factor=1.0, ci95=(1.0, 1.0))
        verified, untuned = self.verified(best), self.verified(baseline)
        # A verified figure is compared with none of the search.
        if verified is not None and untuned is not None:
            return Speedup.of(verified, untuned)
        assert isinstance(best.outcome, Measurement) and isinstance(baseline.outcome, Measurement)
        return Speedup.of(best.outcome, baseline.outcome)

    def best_of_stage(self) -> dict[int, tuple[int, TrialRecord | None]]:
        """For each ZeRO stage tried, in order: how many trials, and the best of them, stopped ones included.

        The study's best is its stage's, whatever the search showed of others.
        """
        stages: dict[int, tuple[int, TrialRecord | None]] = {}
        for stage in sorted({record.config.zero_stage for record in self.records}):
            records = [record for record in self.records if record.config.zero_stage == stage]
            measured = [record for record in records if isinstance(record.outcome, Measurement)]
            best = max(measured, key=lambda record: (record is self.best, self.rate(record)), default=None)
            stages[stage] = (len(records), best)
        return stages
