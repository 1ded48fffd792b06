"""A person's own training script, as plain values that need no torch.

`objectives.running.launch_line` finds out how it is started, `objectives.rank.script` runs it inside a rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from ds_tune.objectives.ds_document import knobs_of
from ds_tune.objectives.ds_file import parsed
from ds_tune.objectives.knobs import Scalar
from ds_tune.objectives.trial import KNOBS, TrialConfig
from ds_tune.objectives.workload.accelerate_launcher import (
    OPTIMAL_YAML,
    config_file,
    is_accelerate,
    tuned_launcher,
    tuned_yaml,
)
from ds_tune.objectives.workload.launch_words import knob_words, module_option
from ds_tune.objectives.workload.model_facts import ModelFacts
from ds_tune.objectives.workload.parameter_counts import ParameterCounts
from ds_tune.objectives.workload.script_facts import PLAIN, TRAINER, ScriptFacts

MICRO_BATCH_FLAGS = (
    "--per_device_train_batch_size", "--train_micro_batch_size_per_gpu", "--micro_batch_size", "--micro_batch",
    "--batch_size_per_gpu", "--per_gpu_batch_size", "--train_batch_size", "--batch_size", "--mbs", "--bs",
)  # fmt: skip
"""Options by which scripts are told their micro-batch size, the surest first; a dash is as good as an underscore."""

ACCUMULATION_FLAGS = ("--gradient_accumulation_steps", "--grad_accumulation_steps", "--accumulation_steps", "--gas")

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

DS_CONFIG_KEYS = {*BATCH_KEYS, "zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "gradient_clipping"}
"""A JSON object with any of these is taken for a DeepSpeed configuration."""

MAPPED_KEYS = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "zero_optimization.stage": "zero_stage",
}
"""Settings of DeepSpeed's that an option of a script may say as well, and the fields of a `TrialConfig` they are."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptStart:
    """What a launcher hands the ranks of a script, and the line that a person types for it."""

    program: str
    """The script's file, from anywhere; or a module's name."""
    is_module: bool
    arguments: tuple[str, ...]
    """Arguments of the script, without the local rank."""
    local_rank_flag: str | None
    """Option that the launcher passes each rank its local rank by."""
    environment: Mapping[str, str]
    """Variables that the launcher sets, beside those that every torch launcher does."""
    folder: str
    """Folder that it is started in."""
    launcher: tuple[str, ...]
    """Words in front of the script in the launch line; none where the line names no launcher."""
    early: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables that the script itself sets before it imports what reads them; see `running.early_environment`."""

    def ds_config_argument(self) -> int | None:
        """Index of the argument that names a file with a DeepSpeed configuration."""
        for index, word in enumerate(self.arguments):
            path = Path(self.folder, word.rpartition("=")[2])
            if path.suffix == ".json" and read_ds_config(path) is not None:
                return index
        return None

    def with_value(self, index: int, value: str) -> Self:
        """The same with another value in the argument at an index, which may be `--option=value`."""
        flag, equals, _ = self.arguments[index].rpartition("=")
        words = (*self.arguments[:index], f"{flag}{equals}{value}", *self.arguments[index + 1 :])
        return dataclasses.replace(self, arguments=words)

    def with_option(self, flag: str, value: str) -> Self:
        """The same with an option set to a value, in the place where it is given or at the end."""
        for index, word in enumerate(self.arguments):
            if word == flag and index + 1 < len(self.arguments):
                return self.with_value(index + 1, value)
            if word.startswith(flag + "="):
                return self.with_value(index, value)
        return dataclasses.replace(self, arguments=(*self.arguments, flag, value))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptWorkload:
    """Training by a person's own script, less what the search decides."""

    kind: ClassVar[str] = "script"
    start: ScriptStart
    facts: ScriptFacts | None = None
    """None before it has run."""
    mapped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Options that follow a setting of DeepSpeed's, by its key, as the person named them; see `MAPPED_KEYS`."""

    @property
    def title(self) -> str:
        return Path(self.start.program).name

    @property
    def known(self) -> ScriptFacts:
        """The facts of a script that has run."""
        assert self.facts is not None
        return self.facts

    @property
    def description(self) -> str:
        facts = self.known
        model = (facts.model or {}).get("model_type", "a model of its own")
        count = f"{facts.parameters / 1e6:.1f}M parameters"
        if facts.trainable_parameters != facts.parameters:
            count += f" ({facts.trainable_parameters / 1e6:.2f}M trained)"
        return f"{self.title} ({facts.loop}), {model} {facts.dtype}, {count}"

    @property
    def dtype(self) -> str:
        return self.known.dtype

    @property
    def tokens_per_sample(self) -> int | None:
        return self.known.tokens_per_sample

    @property
    def counted_tokens_per_sample(self) -> float | None:
        mean = self.known.mean_tokens_per_sample
        return self.known.tokens_per_sample if mean is None else mean

    @property
    def counting(self) -> str:
        return self.known.counting

    @property
    def data_words(self) -> str:
        return ""

    @property
    def weights_are_loaded(self) -> bool:
        return True  # whatever the script does about them, their shapes are its own

    @property
    def base_ds_config(self) -> Mapping[str, Any]:
        return self.known.ds_config

    @property
    def ds_config_is_whole(self) -> bool:
        return True

    @property
    def fills_in_batch_sizes(self) -> bool:
        return self.known.loop == TRAINER

    @property
    def own_knobs(self) -> Mapping[str, Scalar]:
        facts = self.known
        knobs = knobs_of(facts.ds_config, zero_stage=facts.zero_stage)
        own = {field: value for field, value in knobs.items() if field not in self.out_of_reach}
        return {"activation_checkpointing": 1, **own} if facts.checkpoints_activations else own

    @property
    def out_of_reach(self) -> frozenset[str]:
        facts = self.known
        # The script's own options say its precision as well.
        beyond = {"precision"} | {field for field, knob in KNOBS.items() if knob.in_model} - set(facts.model_knobs)
        if facts.tokens_per_sample is None:
            beyond.add("compile")  # it would be compiled anew for each length
        if "optimizer" not in facts.ds_config:
            beyond |= OPTIMIZER_KNOBS
        if self._launcher_decides:  # the launcher's own file says where things are offloaded to
            beyond |= set(knobs_of(facts.ds_config, zero_stage=facts.zero_stage))
        return frozenset(beyond)

    def laid_on(self, config: TrialConfig) -> dict[str, Scalar]:
        """Knobs of the model that a configuration has otherwise than the script as it stands."""
        own = {field: self.own_knobs.get(field, knob.off) for field, knob in KNOBS.items() if knob.in_model}
        return {field: getattr(config, field) for field, value in own.items() if getattr(config, field) != value}

    @property
    def launch_folder(self) -> str:
        return self.start.folder

    def launch_line(self, launcher: Sequence[str], ranks: int, ds_config: Path, config: TrialConfig) -> list[str]:
        start = self.started_with(ds_config, config)
        # Without a launcher of the person's own: what gives ranks no more than they had in the trials.
        words = list(start.launcher or ("torchrun", "--standalone", "--nproc_per_node", str(ranks)))
        if self._launcher_decides:
            words = tuned_launcher(words, ds_config.parent, config)
        program = [*(["-m"] if start.is_module and not start.launcher else []), start.program]
        if knobs := self.laid_on(config):
            # A launcher that was given a module has the option for it among its words.
            is_module = start.is_module and bool(start.launcher)
            program = [*([] if is_module else [module_option(words)]), WITH_KNOBS, *knob_words(knobs),
                       *(["--module"] if start.is_module else []), start.program]  # fmt: skip
        return [*words, *program, *start.arguments]

    @property
    def _launcher_decides(self) -> bool:
        """Whether it is `accelerate launch` that turns DeepSpeed on, with settings of its own and no file."""
        environment = self.start.environment
        return (
            is_accelerate(self.start.launcher)
            and environment.get("ACCELERATE_USE_DEEPSPEED") == "true"
            and "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in environment
        )

    def extra_files(self, config: TrialConfig) -> dict[str, str]:
        index = config_file(self.start.launcher) if self._launcher_decides else None
        if index is None:
            return {}
        path = Path(self.start.folder, self.start.launcher[index].rpartition("=")[2])
        return {OPTIMAL_YAML: tuned_yaml(path.read_text(), config)} if path.is_file() else {}

    def by_hand(self, config: TrialConfig) -> list[str]:
        facts, lines = self.known, []
        reaches = self.start.ds_config_argument() is not None or (self._launcher_decides and not config.knobs_on)
        missing = {"micro_batch_size", "gradient_accumulation_steps"} - set(self.flags)
        if facts.loop == TRAINER:
            words = [] if reaches else ['deepspeed="ds_config_optimal.json"']
            if missing:
                words.append(f"per_device_train_batch_size={config.micro_batch_size}")
                words.append(f"gradient_accumulation_steps={config.gradient_accumulation_steps}")
            return [f"Write TrainingArguments({', '.join(words)})."] if words else []
        if not reaches:
            where = facts.initialized_at
            lines.append(f"Put ds_config_optimal.json in the place of the DeepSpeed settings that reach {where}.")
        return lines

    def in_code(self, config: TrialConfig) -> list[str]:
        """Sentences on how to have in the script's own code what the launch line lays on the model."""
        knobs = self.laid_on(config)
        if not knobs:
            return []
        facts = self.known
        lines = []
        if facts.loop == TRAINER and (every := knobs.get("activation_checkpointing")) in (0, 1):
            del knobs["activation_checkpointing"]
            lines.append(f"Activation checkpointing is the Trainer's gradient_checkpointing={bool(every)}.")
        if knobs:
            call = ", ".join(f"{field}={value!r}" for field, value in knobs.items())
            where = "the Trainer is made" if facts.loop == TRAINER else f"{facts.initialized_at}"
            lines.append(
                f"Without ds-tune in the launch line: `from ds_tune.objectives import apply_knobs` and "
                f"`apply_knobs(model, {call})` before {where}."
            )
        return lines

    def model_document(self) -> Mapping[str, Any] | None:
        return self.known.model

    def model_facts(self) -> ModelFacts | None:
        return None

    @property
    def parameter_counts(self) -> ParameterCounts:
        facts = self.known
        return ParameterCounts(
            parameters=facts.parameters,
            trainable=facts.trainable_parameters,
            adapter_inputs=facts.adapter_inputs,
        )

    @property
    def flags(self) -> dict[str, str]:
        """Options that settings are handed to it by, by the fields of a `TrialConfig`."""
        found = {
            "micro_batch_size": self.known.micro_batch_flag,
            "gradient_accumulation_steps": self.known.accumulation_flag,
        }
        named = {MAPPED_KEYS[key]: flag for key, flag in self.mapped.items()}
        return {field: flag for field, flag in found.items() if flag is not None} | named

    @property
    def batch_follows(self) -> bool:
        """Whether a micro-batch size can be handed to it: by an option, by `TrainingArguments`, or by the file."""
        facts = self.known
        return (
            facts.loop == TRAINER
            or facts.loader_follows
            or "micro_batch_size" in self.flags
            or (facts.loop == PLAIN and self.start.ds_config_argument() is not None)
        )

    def started_with(self, ds_config: Path | None, config: TrialConfig) -> ScriptStart:
        """How it is started under other settings.

        Args:
            ds_config: the file to read in place of the person's; None to leave that argument as it is.
        """
        start = self.start
        if ds_config is not None and (index := start.ds_config_argument()) is not None:
            start = start.with_value(index, str(ds_config))
        for field, flag in self.flags.items():
            start = start.with_option(flag, str(getattr(config, field)))
        return start

    def to_json(self) -> dict[str, Any]:
        document = {"type": self.kind, **dataclasses.asdict(self)}
        del document["start"]["early"]  # scripts put tokens there
        if document["facts"] is not None:
            del document["facts"]["prepare_seconds"]  # a timing of one run: who goes on with a study has another
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = dict(document)
        start = dict(fields["start"])
        for name in ("arguments", "launcher"):
            start[name] = tuple(start[name])
        fields["start"] = ScriptStart(**start)
        if fields.get("facts") is not None:
            fields["facts"] = ScriptFacts.from_json(fields["facts"])
        return cls(**fields)


OPTIMIZER_KNOBS = frozenset({"optimizer", "offload_optimizer"})
"""Knobs that mean DeepSpeed's own optimizer: a script that brings its own has no use for them."""

WITH_KNOBS = "ds_tune.objectives.rank.script.with_knobs"
"""Module that runs a script with knobs laid on its model."""


def read_ds_config(path: Path) -> dict[str, Any] | None:
    """The DeepSpeed configuration in a file; None where there is no such file, or something else in it."""
    try:
        document = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and DS_CONFIG_KEYS & set(document) else None
