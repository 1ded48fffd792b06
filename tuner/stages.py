"""ZeRO stages that DeepSpeed or a person's script refuses: what is left of them is not proposed.

Some settings and optimizers are for some stages only (`prescale_gradients` for 0 and 1); Accelerate's `accumulate` is
refused where DeepSpeed partitions gradients; a model whose `_init_weights` looks into its parameters fails where they
are partitioned as they are made.
"""

from collections.abc import Callable, Sequence

from optuna.trial import FrozenTrial

from ds_tune.objectives.trial import Failure, FailureKind, Measurement
from ds_tune.storage.attributes import record_of
from ds_tune.storage.records import TrialRecord
from ds_tune.tuner.space import Space


def stages_left_out(space: Space, trials: Sequence[FrozenTrial]) -> dict[int, str]:
    """The stages that are left out after these trials, and why: a part of a sentence."""
    ended = (record_of(trial) for trial in trials if trial.state.is_finished())
    records = [record for record in ended if record is not None]
    own = None if space.own is None else space.own.zero_stage
    refused = {stage: f"DeepSpeed refuses it there: {text}" for stage, text in refused_stages(records).items()}
    failing = {} if own is None else failing_stages(records, own_stage=own)
    return refused | {stage: f"the script fails there ({text})" for stage, text in failing.items()}


def refused_stages(records: Sequence[TrialRecord]) -> dict[int, str]:
    """Stages at which DeepSpeed refuses the configuration, and in which words.

    It has trained nothing there; or has refused twice alike where it has. What a script raises is none of this.
    """
    return _decided(records, _refusal)


def _refusal(record: TrialRecord) -> str:
    """DeepSpeed's words where it refused a configuration of a built-in training."""
    failure = record.outcome
    if not isinstance(failure, Failure) or failure.kind is not FailureKind.INVALID_CONFIG or failure.raised:
        return ""
    return failure.message


def failing_stages(records: Sequence[TrialRecord], *, own_stage: int) -> dict[int, str]:
    """Stages at which a script fails by itself, and what it raised there.

    It has trained at another one, and failed where nothing has ended; or twice alike where something has.

    Args:
        own_stage: the stage that it trains at today, which is never one of them.
    """
    if not any(isinstance(record.outcome, Measurement) for record in records):
        return {}
    return _decided([record for record in records if record.config.zero_stage != own_stage], _raised)


def _raised(record: TrialRecord) -> str:
    """What a script raised for another reason than its memory."""
    failure = record.outcome
    return failure.raised if isinstance(failure, Failure) and failure.kind is not FailureKind.OUT_OF_MEMORY else ""


def _decided(records: Sequence[TrialRecord], reason: Callable[[TrialRecord], str]) -> dict[int, str]:
    """Stages whose trials failed for a reason, by it: one such failure where nothing has ended, else two alike.

    Args:
        reason: words for a failure; empty for one of another kind.
    """
    found = {}
    for stage in {record.config.zero_stage for record in records}:
        of_stage = [record for record in records if record.config.zero_stage == stage]
        said = [words for record in of_stage if (words := reason(record))]
        repeated = [words for words in said if said.count(words) > 1]
        if decisive := repeated if any(record.counts for record in of_stage) else said:
            found[stage] = decisive[0]
    return found
