"""What is kept of a trial (`TrialRecord`) and what a study amounts to (`StudySummary`)."""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ds_tune.objectives.cost_model.forecast import Excluded, Forecast
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.metric import DEFAULT_METRIC
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.timing.intervals import speedup_ci95
from ds_tune.objectives.trial import (
    Failure,
    FailureKind,
    Measurement,
    Outcome,
    Provenance,
    TrialConfig,
    outcome_from_json,
)
from ds_tune.objectives.workload.huggingface import Workload
from ds_tune.storage.ablations import Contributions
from ds_tune.storage.finalists import (
    Finalist,
    VerifiedRate,
    is_busy,
    step_spread,
    undisturbed_log_rate,
    undisturbed_speedup,
    verified_rate,
)

RECORD_VERSION = 1

CONTENDERS = 5
"""Where something else uses the machine, the fastest of nine trials may have looked as slow as the fifth."""


class TrialState(enum.StrEnum):
    """How a trial ended, as Optuna counts it."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"


class Source(enum.StrEnum):
    """Who proposed a configuration."""

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
    """What the cost model believed just before the trial; None where another sampler searched."""

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
            seen = f"{len(self.outcome.step_seconds)} steps"
            parts = self.outcome.from_parts
            if micro_steps := parts.micro_steps if parts else self.outcome.from_micro_steps:
                seen = f"{micro_steps} micro-steps"
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
    """The same command continues it."""
    NOTHING_FITS = "nothing_fits"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times faster one trial is than another."""

    factor: float
    ci95: tuple[float, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudySummary:
    """A study as its records tell it; derived whenever it is needed, never stored."""

    study: str
    workload: Workload
    machine: Machine
    versions: Mapping[str, str]
    trials_total: int
    """What the study was asked to reach."""
    tuning_seconds: float
    """Time that tuners spent on it, over all sessions, from the first trial's begin on."""
    finals_seconds: float = 0.0
    """Time spent after the search, over all sessions: verification, comparison of losses, ablations."""
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
    """Those shown to be level with the winner, or with the fastest where the winner saves memory."""
    unsettled: Sequence[str] = ()
    """Those that the verification could not tell from the winner."""
    numerics: Mapping[str, NumericsCheck | str] = dataclasses.field(default_factory=dict)
    """What the finalists' losses showed, or why they could not be compared, by the configuration's name."""
    contributions: Contributions | None = None
    """What each setting of the winner brings; None before it was measured."""
    excluded: Sequence[Excluded] = ()
    """What was not launched because it certainly does not fit."""

    @property
    def finished_trials(self) -> int:
        return sum(record.counts for record in self.records)

    @property
    def state(self) -> StudyState:
        done = self.finished_trials >= self.trials_total or self.ended is not None
        if not done:
            return StudyState.UNFINISHED
        return StudyState.FINISHED if self.best is not None else StudyState.NOTHING_FITS

    @property
    def best(self) -> TrialRecord | None:
        """The winner of the verification; before there is one, the fastest trial."""
        for record in self.records:
            if record.config.name == self.winner and record.state is TrialState.COMPLETE:
                return record
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

        How far the others' runs lie apart counts, but not the baseline's: launching decides there, which is its own.
        """
        finalists = self.finalists
        finalist = finalists.pop(record.config.name, None)
        if finalist is None:
            return None
        if self.baseline is not None:
            finalists.pop(self.baseline.config.name, None)
        return verified_rate(finalist, finalists.values())

    @property
    def contenders(self) -> dict[str, Finalist]:
        """Measurements of the trials that may be the fastest where all have been disturbed, by name, the fastest first:
        the first `CONTENDERS` by the fastest steps of each."""
        finalists = [
            (record.config.name, Finalist(record.outcome, self.verification.get(record.config.name, ())))
            for record in self.eligible
            if isinstance(record.outcome, Measurement)
        ]
        finalists.sort(key=lambda each: -undisturbed_log_rate(each[1].search))
        return dict(finalists[:CONTENDERS])

    @property
    def disturbance(self) -> float | None:
        """Relative difference between the slow and the fast steps of one configuration, where something else uses the
        machine; None on a quiet one."""
        contenders = list(self.contenders.values())
        if self.provenance is not Provenance.MEASURED or not is_busy(contenders):
            return None
        return max(step_spread(each.all_runs) for each in contenders)

    def rate(self, record: TrialRecord) -> float:
        """Samples/s as verified; without verification runs, of the search; 0 for a trial without a measurement."""
        verified = self.verified(record)
        return verified.samples_per_second if verified is not None else record.samples_per_second or 0.0

    @property
    def verification_seconds(self) -> float:
        """What the verification took, which is no part of `tuning_seconds`."""
        return math.fsum(run.wall_seconds for runs in self.verification.values() for run in runs)

    @property
    def total_seconds(self) -> float:
        """Search and what came after it."""
        return self.tuning_seconds + max(self.finals_seconds, self.verification_seconds)

    @property
    def trial_seconds(self) -> float:
        """What all trials took by their own account, which for trials that were not run here is not
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
        assert isinstance(best.outcome, Measurement) and isinstance(baseline.outcome, Measurement)
        if best is baseline:
            return Speedup(factor=1.0, ci95=(1.0, 1.0))
        finalists = self.finalists
        if self.disturbance is not None and {best.config.name, baseline.config.name} <= set(finalists):
            fast, slow = finalists.pop(best.config.name), finalists.pop(baseline.config.name)
            factor, interval = undisturbed_speedup(fast, slow, finalists.values())
            return Speedup(factor=factor, ci95=interval)
        verified, untuned = self.verified(best), self.verified(baseline)
        if verified is not None and untuned is not None:
            factor, interval = speedup_ci95(
                verified.samples_per_second,
                verified.samples_per_second_ci95,
                untuned.samples_per_second,
                untuned.samples_per_second_ci95,
            )
            return Speedup(factor=factor, ci95=interval)
        factor, interval = speedup_ci95(
            best.outcome.samples_per_second,
            best.outcome.samples_per_second_ci95,
            baseline.outcome.samples_per_second,
            baseline.outcome.samples_per_second_ci95,
        )
        return Speedup(factor=factor, ci95=interval)

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
