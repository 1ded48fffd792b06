"""The configuration of a model: where it comes from, which head of it is trained, and how long a sample may be.

It imports no DeepSpeed, so that `describe` is quick. Whoever asks, `plan` or a rank, is refused by the same sentences.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload, model_config_path
from ds_tune.objectives.workload.model_sizes import check_length, check_sizes, usable_positions

OWN_SCRIPT = "or tune a training script of your own"

NOT_TRAINED = {
    "git": "its loss is of captions for pictures",
    "perceiver": "its language model takes bytes of one fixed length",
    "reformer": "it takes only samples as long as its axial_pos_shape says",
}
"""Types with a language-model head that nevertheless cannot be trained on tokens alone, and why."""


class Refusal(UsageError):
    """A model that cannot be trained here; the text goes on after the model's name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is trained of a model."""

    auto_class: Any
    """transformers' `Auto` class that builds it."""
    trained_class: str
    named_class: str | None
    """Class that the configuration names, where that is another."""

    @property
    def is_masked(self) -> bool:
        return self.auto_class is transformers.AutoModelForMaskedLM


def load_config(workload: HuggingFaceWorkload) -> transformers.PretrainedConfig:
    """The model's configuration: shipped, from a local file or folder, or from the hub.

    Raises:
        UsageError: it cannot be had, or the model is of no kind that is trained here, or takes fewer tokens.
    """
    try:
        if workload.model in SHIPPED_MODELS and not workload.pretrained:
            fields = dict(SHIPPED_MODELS[workload.model])
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            path = model_config_path(workload.model)
            config = read_config(str(path) if path else workload.model)
        check_sizes(config.to_dict(), workload.model)
        head_of(config)
    except Refusal as error:
        raise UsageError(f"`model={workload.model}`{error}") from error
    check_length(usable_length(config), workload.seq_len, workload.model)
    config.use_cache = False  # the key-value cache is for generation; in training it only costs memory
    return config


def read_config(source: str) -> transformers.PretrainedConfig:
    """The configuration of a file, a folder or a hub id.

    Raises:
        Refusal: transformers cannot read it.
    """
    try:
        document, _ = transformers.PretrainedConfig.get_config_dict(source)
        check_code(document)
        # Asked for nothing: else transformers asks the terminal whether to run a model's own code.
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Refusal:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        said = " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__
        raise Refusal(f" cannot be loaded: {said}") from error
    return config


def check_code(document: Mapping[str, Any]) -> None:
    """
    Raises:
        Refusal: the model's code is its own, and no part of transformers.
    """
    if not document.get("auto_map"):
        return
    named = _first(document.get("architectures"))
    is_known = document.get("model_type") in transformers.CONFIG_MAPPING
    # Many a model has become part of transformers since, and still names its old code.
    if is_known and (named is None or hasattr(transformers, named)):
        return
    raise Refusal(
        f": the code of {named or 'this model'} is its own (auto_map), no part of transformers, and is not run here; "
        f"name a model that transformers has, {OWN_SCRIPT}"
    )


def head_of(config: transformers.PretrainedConfig) -> Head:
    """What of a model is trained: the head that its configuration names, if that is of a language model.

    Raises:
        Refusal: it has none, or the whole of it is something else.
    """
    if (reason := NOT_TRAINED.get(config.model_type)) is not None:
        raise Refusal(f": models of type {config.model_type} are not trained here ({reason}); {OWN_SCRIPT[3:]}")
    named = _first(config.architectures)
    heads = {}
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM):
        if type(config) in auto_class._model_mapping:
            found = auto_class._model_mapping[type(config)]
            heads[auto_class] = (found[0] if isinstance(found, tuple) else found).__name__
    is_whole = not getattr(config, "is_encoder_decoder", False)
    if not is_whole and heads:
        # transformers lists BART's whole model among the masked ones.
        heads = {key: name for key, name in heads.items() if not name.endswith("ForConditionalGeneration")}
    if not heads:
        raise Refusal(
            f": models of type {config.model_type} have no language-model head that transformers can train on tokens "
            f"alone (causal or masked); name another, {OWN_SCRIPT}"
        )
    for auto_class, name in heads.items():
        if name == named:
            return Head(auto_class=auto_class, trained_class=name, named_class=None)
    if not is_whole:
        alone = next(iter(heads.values()))
        raise Refusal(
            f": {named or config.model_type} is an encoder with a decoder, which is not trained here; to train its "
            f'decoder alone, write "architectures": ["{alone}"] into its configuration, {OWN_SCRIPT}'
        )
    auto_class = next(iter(heads))
    if named is not None and not getattr(config, "is_decoder", False):
        auto_class = list(heads)[-1]  # of an encoder, which has both, the masked one
    return Head(auto_class=auto_class, trained_class=heads[auto_class], named_class=named)


def model_class(config: transformers.PretrainedConfig) -> Any:
    """The `Auto` class that trains this kind of model; see `head_of`."""
    return head_of(config).auto_class


def usable_length(config: transformers.PretrainedConfig) -> int | None:
    """Tokens that a sample may have; None where there is no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return usable_positions(text.model_type, limit, getattr(text, "pad_token_id", None))


def attention_sizes(config: transformers.PretrainedConfig) -> tuple[int, int, int]:
    """(layers, heads, dimension of a head) as they are used in training; 0 for what there is not."""
    text = config.get_text_config()
    alone = "decoder_" if getattr(text, "is_encoder_decoder", False) else ""  # a decoder that is trained alone
    layers = stated_number(text, f"{alone}layers" if alone else "", "num_hidden_layers", "n_layer", "num_layers")
    heads = stated_number(
        text, f"{alone}attention_heads" if alone else "", "num_attention_heads", "n_head", "num_heads"
    )
    hidden = stated_number(text, "hidden_size", "d_model")
    if not heads:
        return layers, 0, 0
    return layers, heads, stated_number(text, "qk_head_dim", "head_dim") or hidden // heads


def stated_number(config: transformers.PretrainedConfig, *names: str) -> int:
    """The first of a configuration's numbers with these names; 0 where it has none. Of one a layer the largest."""
    for name in names:
        try:
            value = getattr(config, name, None) if name else None
        except RuntimeError:  # it differs from layer to layer, as Gemma 4's
            value = None
        if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _first(architectures: Any) -> str | None:
    return str(architectures[0]) if isinstance(architectures, list) and architectures else None
