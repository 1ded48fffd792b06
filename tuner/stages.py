"""ZeRO stages at which a person's script fails by itself: what is left of them is not proposed.

Accelerate's `accumulate` is refused where DeepSpeed partitions gradients; a model whose `_init_weights` looks into its
parameters fails where they are partitioned as they are made.
"""

from collections.abc import Sequence

from optuna.trial import FrozenTrial

from ds_tune.objectives.trial import Failure, FailureKind, Measurement
from ds_tune.storage.attributes import record_of
from ds_tune.storage.records import TrialRecord
from ds_tune.tuner.space import Space


def stages_left_out(space: Space, trials: Sequence[FrozenTrial]) -> dict[int, str]:
    """The stages that are left out after these trials, and what the script raised there."""
    if space.own is None:
        return {}
    ended = (record_of(trial) for trial in trials if trial.state.is_finished())
    return failing_stages([record for record in ended if record is not None], own_stage=space.own.zero_stage)


def failing_stages(records: Sequence[TrialRecord], *, own_stage: int) -> dict[int, str]:
    """Stages at which a script fails by itself, and what it raised there.

    It has trained at another one, and failed where nothing has ended; or twice alike where something has.

    Args:
        own_stage: the stage that it trains at today, which is never one of them.
    """
    if not any(isinstance(record.outcome, Measurement) for record in records):
        return {}
    found = {}
    for stage in {record.config.zero_stage for record in records} - {own_stage}:
        of_stage = [record for record in records if record.config.zero_stage == stage]
        raised = [text for record in of_stage if (text := _raised(record))]
        repeated = [text for text in raised if raised.count(text) > 1]
        if decisive := repeated if any(record.counts for record in of_stage) else raised:
            found[stage] = decisive[0]
    return found


def _raised(record: TrialRecord) -> str:
    """What a script raised for another reason than its memory."""
    failure = record.outcome
    return failure.raised if isinstance(failure, Failure) and failure.kind is not FailureKind.OUT_OF_MEMORY else ""
