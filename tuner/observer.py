"""Callbacks for study progress."""

from collections.abc import Sequence
from typing import Protocol

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.trial import Outcome, TrialConfig
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.time_left import RunsLeft


class Observer(Protocol):
    """Callbacks for study progress."""

    def say(self, text: str) -> None:
        """One line for the person, such as what a study does without."""

    def study_opened(self, summary: StudySummary, again: Sequence[str]) -> None:
        """The study is open; `again` names interrupted configurations that will run again."""

    def trial_started(self, number: int, config: TrialConfig, summary: StudySummary) -> None: ...

    def phase(self, phase: str) -> None: ...

    def trial_finished(self, record: TrialRecord, summary: StudySummary) -> None: ...

    def verification_started(self, record: TrialRecord, summary: StudySummary, left: RunsLeft) -> None:
        """A finalist runs again; `left` are the runs that may still come, with it."""

    def verification_finished(self, record: TrialRecord, outcome: Outcome) -> None: ...

    def numerics_started(
        self, record: TrialRecord, compared: TrialConfig, summary: StudySummary, left: RunsLeft
    ) -> None:
        """A finalist's losses are compared; `compared` runs now, the finalist or what it is compared with."""

    def numerics_finished(self, record: TrialRecord, found: NumericsCheck | str) -> None:
        """The comparison is over; `found` is what the losses showed, or why they could not be compared."""

    def ablation_started(self, winner: TrialRecord, config: TrialConfig, summary: StudySummary, left: RunsLeft) -> None:
        """The winner runs without one of its settings, to see what that brings."""

    def finalist_added(self, record: TrialRecord, summary: StudySummary) -> None:
        """Without one of its settings the winner was faster, so that this is a finalist, too."""


def check_observer(observer: object) -> None:
    """
    Raises:
        UsageError: it is not None, and lacks a callback.
    """
    callbacks = [name for name in vars(SilentObserver) if not name.startswith("_")]
    missing = [name for name in callbacks if not callable(getattr(observer, name, None))]
    if observer is not None and (missing or isinstance(observer, type)):
        why = f"lacks {', '.join(missing)}" if missing else "is a class"
        raise UsageError(f"`observer` {why}; give it an object of a class derived from `SilentObserver`")


class SilentObserver:
    """Observer that does nothing; an observer of some events overrides theirs."""

    def say(self, text: str) -> None:
        pass

    def study_opened(self, summary: StudySummary, again: Sequence[str]) -> None:
        pass

    def trial_started(self, number: int, config: TrialConfig, summary: StudySummary) -> None:
        pass

    def phase(self, phase: str) -> None:
        pass

    def trial_finished(self, record: TrialRecord, summary: StudySummary) -> None:
        pass

    def verification_started(self, record: TrialRecord, summary: StudySummary, left: RunsLeft) -> None:
        pass

    def verification_finished(self, record: TrialRecord, outcome: Outcome) -> None:
        pass

    def numerics_started(
        self, record: TrialRecord, compared: TrialConfig, summary: StudySummary, left: RunsLeft
    ) -> None:
        pass

    def numerics_finished(self, record: TrialRecord, found: NumericsCheck | str) -> None:
        pass

    def ablation_started(self, winner: TrialRecord, config: TrialConfig, summary: StudySummary, left: RunsLeft) -> None:
        pass

    def finalist_added(self, record: TrialRecord, summary: StudySummary) -> None:
        pass
