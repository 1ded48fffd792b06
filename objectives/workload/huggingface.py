"""A built-in training: a Hugging Face model, its precision and its data, as plain values that need no torch.

`objectives.rank.model` and `objectives.rank.data` turn it into the real thing inside a rank.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import Scalar
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.data_facts import DataFacts
from ds_tune.objectives.workload.dataset_files import dataset_files
from ds_tune.objectives.workload.launch_words import knob_words
from ds_tune.objectives.workload.model_facts import ModelFacts, facts_of
from ds_tune.objectives.workload.model_sizes import (
    check_length,
    check_sizes,
    is_counted_by_formula,
    stated_sizes,
    usable_positions,
)
from ds_tune.objectives.workload.trainer_file import TRAINER_FILE, has_open_values, trainer_file, trainer_words

DTYPES = ("fp16", "bf16", "fp32")

TRAINING_MODULE = "ds_tune.objectives.rank.train"
"""Script that trains it outside of a study."""

SHIPPED_MODELS: dict[str, dict[str, Any]] = {
    # Published sizes of the GPT-2 family: Radford et al. 2019, as in the hub's config.json files.
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"model_type": "gpt2", "n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25},
    # Not a published model: small enough that two CPU ranks train it in tens of milliseconds a step.
    "gpt2-nano": {
        "model_type": "gpt2",
        "n_layer": 4,
        "n_embd": 128,
        "n_head": 4,
        "vocab_size": 4096,
        "n_positions": 256,
    },
}
"""Model configurations that come with ds-tune, so that no hub is needed; keys not named are transformers'."""

CHECKPOINTING = ("activation_checkpointing", 1)
"""Knob that the Trainer has an argument for."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceWorkload:
    """Training of a Hugging Face model by ds-tune's own loop, less what the search decides."""

    kind: ClassVar[str] = "hugging_face"
    model: str
    """A key of `SHIPPED_MODELS`, a folder or file with a Hugging Face configuration, or a hub id."""
    seq_len: int
    dtype: str
    pretrained: bool = False
    """Load weights (from the hub or a local folder) instead of initialising them; speed is the same."""
    dataset: str | None = None
    """Local text, JSON, CSV, Parquet or Arrow files (a folder or a glob), or a hub id; None means synthetic tokens."""
    text_column: str | None = None
    """Column of it to train on; None to find out."""
    packing: bool = True
    """Cut the joined samples into blocks of `seq_len` tokens, instead of padding each to the longest beside it."""
    data: DataFacts | None = None
    """What a look at it showed; None before, and of synthetic tokens."""
    tokenizer: str | None = None
    base_ds_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The user's own DeepSpeed settings; `objectives.ds_config` lays each trial's over them."""

    @property
    def title(self) -> str:
        return self.model

    @property
    def tokens_per_sample(self) -> int:
        # Of samples that differ the longest one: what memory is needed for, and an upper end of the time.
        longest = None if self.data is None else self.data.longest_sample
        return self.seq_len if longest is None else longest

    @property
    def counted_tokens_per_sample(self) -> float | None:
        mean = None if self.data is None else self.data.mean_tokens
        return self.seq_len if mean is None else mean

    @property
    def counting(self) -> str:
        return "" if self.data is None else self.data.counting

    @property
    def data_words(self) -> str:
        return "" if self.data is None else self.data.words

    @property
    def weights_are_loaded(self) -> bool:
        return self.pretrained

    @property
    def description(self) -> str:
        data = self.dataset or "synthetic tokens"
        return f"{self.model} {self.dtype}, sequence length {self.seq_len}, {data}"

    def model_document(self) -> Mapping[str, Any]:
        """Configuration of the model in transformers' JSON form.

        Raises:
            UsageError: it cannot be had here.
        """
        if self.model in SHIPPED_MODELS:
            return SHIPPED_MODELS[self.model]
        path = model_config_path(self.model)
        if path is not None:
            local: Mapping[str, Any] = json.loads(path.read_text())
            return local
        document, said = _from_hub(self.model)
        if document is None:
            raise UsageError(
                f"`model={self.model}`: its config.json cannot be had from the hub ({said}); name a local folder"
            )
        return document

    def model_facts(self) -> ModelFacts | None:
        document = self.model_document()
        if self.model in SHIPPED_MODELS or is_counted_by_formula(document):
            return None
        return facts_of(document, self.model)

    @property
    def ds_config_is_whole(self) -> bool:
        return False

    @property
    def fills_in_batch_sizes(self) -> bool:
        return False

    @property
    def own_knobs(self) -> Mapping[str, Scalar]:
        return {}

    @property
    def out_of_reach(self) -> frozenset[str]:
        # It would be compiled anew for each length.
        return frozenset({"compile"}) if self.counting else frozenset()

    @property
    def parameter_counts(self) -> None:
        return None

    @property
    def launch_folder(self) -> None:
        return None

    def launch_line(self, launcher: Sequence[str], ranks: int, ds_config: Path, config: TrialConfig) -> list[str]:
        words = [*launcher, *self._training_words()]
        return [*words, *knob_words(config.model_knobs), "--deepspeed", "--deepspeed_config", str(ds_config)]

    def extra_files(self, config: TrialConfig) -> dict[str, str]:
        if not has_open_values(self.base_ds_config):
            return {}
        document = trainer_file(self.base_ds_config, config, self.dtype)
        return {TRAINER_FILE: json.dumps(document, indent=2) + "\n"}

    def by_hand(self, config: TrialConfig) -> list[str]:
        return []

    def in_code(self, config: TrialConfig) -> list[str]:
        if not has_open_values(self.base_ds_config):
            return []
        words = " ".join(trainer_words(self.base_ds_config, config, self.dtype))
        lines = [f'For the Trainer {TRAINER_FILE} is your file with its "auto", which goes with {words}.']
        every = config.activation_checkpointing
        if knobs := {field: value for field, value in config.model_knobs.items() if (field, every) != CHECKPOINTING}:
            call = ", ".join(f"{field}={value!r}" for field, value in knobs.items())
            lines.append(
                "There, `from ds_tune.objectives import apply_knobs` and "
                f"`apply_knobs(model, {call})` go before the Trainer is made."
            )
        return lines

    def _training_words(self) -> list[str]:
        """Program and arguments that train it under DeepSpeed's launcher."""
        words = ["--module", TRAINING_MODULE, "--model", self.model, "--seq-len", str(self.seq_len)]
        if self.dataset is not None:
            words += ["--dataset", self.dataset]
        if self.text_column is not None:
            words += ["--text-column", self.text_column]
        if not self.packing:
            words.append("--no-packing")
        if self.tokenizer is not None:
            words += ["--tokenizer", self.tokenizer]
        return [*words, "--pretrained"] if self.pretrained else words

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = dict(document)
        if fields.get("data") is not None:
            fields["data"] = DataFacts(**fields["data"])
        return cls(**fields)


def check_workload(workload: HuggingFaceWorkload) -> None:
    """Finds what can be known to be wrong without loading anything.

    Raises:
        UsageError: the model, data or precision named cannot be what was meant.
    """
    if workload.dtype not in DTYPES:
        raise UsageError(f"`dtype={workload.dtype}` is none of {', '.join(DTYPES)}")
    if workload.seq_len < 2:
        raise UsageError(f"`seq_len` must be at least 2 (got {workload.seq_len})")
    _check_model(workload)
    if workload.tokenizer is not None and workload.dataset is None:
        raise UsageError(
            f"`tokenizer={workload.tokenizer}` is for the text of `dataset`, and synthetic tokens have none; "
            "add `dataset` or leave out `tokenizer`"
        )
    if workload.text_column is not None and workload.dataset is None:
        raise UsageError(f"`text_column={workload.text_column}` is of `dataset`, and there is none; add it")
    if not workload.packing and workload.dataset is None:
        raise UsageError("`packing=False` is of the samples of `dataset`, and synthetic tokens have none; add it")
    is_local = workload.dataset is not None and not _HUB_ID.fullmatch(workload.dataset)
    if is_local and dataset_files(str(workload.dataset)).is_empty:
        raise UsageError(f"`dataset={workload.dataset}` is empty; name files with text or token ids in them")


def _check_model(workload: HuggingFaceWorkload) -> None:
    model = workload.model
    if model in SHIPPED_MODELS:
        check_length(SHIPPED_MODELS[model].get("n_positions", 1024), workload.seq_len, model)
        return
    path = model_config_path(model)
    if path is None:
        if Path(model).exists():
            raise UsageError(
                f"`model={model}` has no config.json; name a folder that a Hugging Face model was saved to"
            )
        if not _HUB_ID.fullmatch(model) or model.startswith("."):
            known = ", ".join(SHIPPED_MODELS)
            raise UsageError(
                f"`model={model}` is neither a file, a folder nor a hub id (owner/name); shipped models: {known}"
            )
        document, _ = _from_hub(model)
        if document is not None:  # else the ranks say what is wrong, where they cannot have it either
            _check_configuration(document, workload)
        return
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"`model={model}`: {path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or not ("model_type" in config or config.get("auto_map")):
        raise UsageError(f"`model={model}`: {path} is no Hugging Face configuration (it has no model_type)")
    _check_configuration(config, workload)


def _check_configuration(config: Mapping[str, Any], workload: HuggingFaceWorkload) -> None:
    """
    Raises:
        UsageError: it is of no model that is trained here, or of one that takes fewer tokens.
    """
    check_sizes(config, workload.model)
    facts = workload.model_facts()
    if facts is not None:
        check_length(facts.positions, workload.seq_len, workload.model)
    elif is_counted_by_formula(config):
        sizes = stated_sizes(config)
        stated = sizes.get("max_position_embeddings", sizes.get("n_positions"))
        limit = usable_positions(config["model_type"], stated, sizes.get("pad_token_id"))
        check_length(limit, workload.seq_len, workload.model)


def trained_instead(workload: HuggingFaceWorkload) -> str | None:
    """The sentence that says what is trained, where the configuration names something else; None where it does not.

    Raises:
        UsageError: the model cannot be trained here.
    """
    try:
        facts = workload.model_facts()
    except UsageError:
        if _HUB_ID.fullmatch(workload.model) and not Path(workload.model).exists():
            return None  # the ranks say what is wrong
        raise
    if facts is None or facts.named_class is None:
        return None
    named = facts.named_class
    return f"Trained is {facts.trained_class}: the configuration names {named}, whose head is not trained here."


@functools.lru_cache
def _from_hub(model: str) -> tuple[Mapping[str, Any] | None, str]:
    """The configuration on the hub, or None and why it cannot be had."""
    # Imported late: it takes a third of a second, and only hub ids need it.
    import huggingface_hub

    try:
        return json.loads(Path(huggingface_hub.hf_hub_download(model, "config.json")).read_text()), ""
    except Exception as error:  # the library raises a dozen kinds, for network, login and missing files
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__


def model_config_path(model: str) -> Path | None:
    """The local config.json that `model` names, or None when it names none."""
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    return None
