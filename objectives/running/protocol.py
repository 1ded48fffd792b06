"""The messages between the tuner and its ranks, each one JSON document on a line of its own.

To a rank: a `Setup`, then any number of `Time`, `Losses` and `Learn` commands, one after another. From a rank: `Ready`
once it could run a trial, or `Refused`; during a trial `Phase` and `Notice`; at its end `Finished` or `Failed`; and
`Released` once it has given back what the trial held. A message is complete in itself: nothing is left in a file for
the other side to read, so the two need no file system in common.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Failure, TrialConfig
from ds_tune.objectives.workload.kinds import Workload, workload_from_json
from ds_tune.objectives.workload.script_facts import ScriptFacts

DEEPSPEED = "deepspeed"
VANILLA = "vanilla"
"""Trainer without DeepSpeed, to compare with: of a configuration it has the batch sizes, and nothing else."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Study that a rank works for: all that stays the same from trial to trial."""

    workload: Workload
    machine: Machine
    optimizers: tuple[TrialConfig, ...] = ()
    """Configurations whose optimizers are compiled before the first trial; without any, the default one."""
    trainer: str = DEEPSPEED
    """Trainer of the model: `DEEPSPEED` or `VANILLA`."""

    def to_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload.to_json(),
            "machine": self.machine.to_json(),
            "optimizers": [config.to_json() for config in self.optimizers],
            "trainer": self.trainer,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            workload=workload_from_json(document["workload"]),
            machine=Machine.from_json(document["machine"]),
            optimizers=tuple(TrialConfig.from_json(config) for config in document["optimizers"]),
            trainer=document["trainer"],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """Timed trial as one rank saw it; `Measurement` says what each figure is."""

    step_seconds: tuple[float, ...]
    step_ci95_seconds: tuple[float, float]
    """95% confidence interval of the mean whole step."""
    from_parts: StepParts | None
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    warmup_step_seconds: tuple[float, ...]
    first_steps_seconds: float
    stopped_early: bool
    drifting: bool
    skipped_steps: int
    deepspeed_samples_per_second: float | None
    peak_memory_bytes: int
    reserved_memory_bytes: int
    alloc_retries: int
    setup_seconds: float
    model_parameters: int
    flops_per_sample: float
    tokens_per_sample: float | None = None
    """Tokens, padding apart, that count as one sample: `step_seconds` are for a whole batch of such samples, fed to all
    ranks, whatever each step was fed. None where it is samples that are counted."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = dict(document)
        for key in ("step_seconds", "step_ci95_seconds", "warmup_step_seconds"):
            fields[key] = tuple(fields[key])
        fields["from_parts"] = StepParts.from_json(fields["from_parts"]) if fields["from_parts"] else None
        return cls(**fields)


class _Message:
    """Base of messages; those whose fields are no plain values say how these become JSON."""

    __slots__: tuple[str, ...] = ()
    tag: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__slots__}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup(_Message):
    """Command: get ready to run trials."""

    tag = "setup"
    context: RankContext

    def to_json(self) -> dict[str, Any]:
        return {"context": self.context.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(context=RankContext.from_json(document["context"]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Time(_Message):
    """Command: train with a configuration and time its optimizer steps. Answered by a `RankResult`."""

    tag = "time"
    config: TrialConfig
    log_folder: Path
    """Folder on the rank's host that its output goes to."""
    plan: StepPlan
    seconds_per_sample: float | None
    """Seconds per sample of one rank of the slowest trial so far, to know what hangs; None before any."""
    best_samples_per_second: float | None
    """Throughput of the study's best, to stop what is clearly slower; None to time to the end."""

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "log_folder": str(self.log_folder),
            "plan": dataclasses.asdict(self.plan),
            "seconds_per_sample": self.seconds_per_sample,
            "best_samples_per_second": self.best_samples_per_second,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            config=TrialConfig.from_json(document["config"]),
            log_folder=Path(document["log_folder"]),
            plan=StepPlan(**document["plan"]),
            seconds_per_sample=document["seconds_per_sample"],
            best_samples_per_second=document["best_samples_per_second"],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Losses(_Message):
    """Command: train a few optimizer steps without timing them. Answered by a `LossCurve`."""

    tag = "losses"
    config: TrialConfig
    log_folder: Path
    """See `Time`, as for `seconds_per_sample`."""
    steps: int
    """Optimizer steps that overflow did not skip."""
    seconds_per_sample: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "log_folder": str(self.log_folder),
            "steps": self.steps,
            "seconds_per_sample": self.seconds_per_sample,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            config=TrialConfig.from_json(document["config"]),
            log_folder=Path(document["log_folder"]),
            steps=document["steps"],
            seconds_per_sample=document["seconds_per_sample"],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Learn(_Message):
    """Command: run a person's script as it stands for a few optimizer steps. Answered by `ScriptFacts`."""

    tag = "learn"
    log_folder: Path
    """See `Time`."""

    def to_json(self) -> dict[str, Any]:
        return {"log_folder": str(self.log_folder)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(log_folder=Path(document["log_folder"]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ready(_Message):
    """Event: the rank could run a trial."""

    tag = "ready"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refused(_Message):
    """Event: no trial could run, and the rank ends."""

    tag = "refused"
    message: str
    """Sentence for the user."""
    usage: bool
    """Whether what was asked for is at fault, rather than the machine or its software."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase(_Message):
    """Event: the rank enters a phase of a trial."""

    tag = "phase"
    phase: str
    seconds: float | None = None
    """Longest that the phase may take before it counts as hung; None for any time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Notice(_Message):
    """Event: a line for the user, at any time."""

    tag = "notice"
    text: str
    seconds: float = 0.0
    """Seconds that what follows may take."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Message):
    """Event: a command was carried out."""

    tag = "finished"
    result: RankResult | LossCurve | ScriptFacts

    def to_json(self) -> dict[str, Any]:
        return {_RESULT_TAGS[type(self.result)]: self.result.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        [(tag, result)] = document.items()
        kind = next(kind for kind, name in _RESULT_TAGS.items() if name == tag)
        return cls(result=kind.from_json(result))


_RESULT_TAGS: dict[type[RankResult] | type[LossCurve] | type[ScriptFacts], str] = {
    RankResult: "timed",
    LossCurve: "curve",
    ScriptFacts: "facts",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Message):
    """Event: a command ended in an exception."""

    tag = "failed"
    failure: Failure

    def to_json(self) -> dict[str, Any]:
        return {"failure": self.failure.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(failure=Failure.from_json(document["failure"]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Released(_Message):
    """Event: the rank has given back what the trial held."""

    tag = "released"
    left_bytes: Mapping[str, int]
    """Memory held beyond what was held after the rank's first trial, on `device` and `host`."""
    collectives: tuple[int, ...]
    """Collectives issued so far in each process group: ranks may go on together only where these agree."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(left_bytes=document["left_bytes"], collectives=tuple(document["collectives"]))


Command: TypeAlias = Setup | Time | Losses | Learn
Event: TypeAlias = Ready | Refused | Phase | Notice | Finished | Failed | Released

_COMMANDS: dict[str, type[Command]] = {kind.tag: kind for kind in (Setup, Time, Losses, Learn)}
_EVENTS: dict[str, type[Event]] = {
    kind.tag: kind for kind in (Ready, Refused, Phase, Notice, Finished, Failed, Released)
}


def encode(message: Command | Event) -> bytes:
    """Line of a message, its end included."""
    key = "command" if message.tag in _COMMANDS else "event"
    return json.dumps({key: message.tag, **message.to_json()}).encode() + b"\n"


def decode_command(line: str | bytes) -> Command:
    """Command of a line."""
    document = json.loads(line)
    return _COMMANDS[document.pop("command")].from_json(document)


def decode_event(line: str | bytes) -> Event:
    """Event of a line."""
    document = json.loads(line)
    return _EVENTS[document.pop("event")].from_json(document)
