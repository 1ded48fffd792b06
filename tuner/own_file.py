"""A person's DeepSpeed file as the yardstick of a study of a built-in model: the configuration it describes, its
precision, and what of it trials have otherwise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ds_tune.objectives.ds_document import (
    has_open_schedule,
    knobs_of,
    precision_of,
    switched_off,
)
from ds_tune.objectives.ds_file import DsFile, stated, unknown_keys
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.loss_scale import forgets_loss_scale
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.request import SearchRequest

MODEL_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""Precisions by torch's names, as configurations of models have them."""

MODELS_OWN = "the model's configuration"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A precision, and in words where it comes from."""

    dtype: str
    origin: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OwnConfiguration:
    """The configuration that a file describes on so many ranks."""

    config: TrialConfig | None
    """None where it says nothing of what is searched: what is untuned is then the yardstick."""
    holds_batch: bool
    """The file says its batch sizes, so that its global batch is the training."""
    notes: tuple[str, ...] = ()


def precision_for(
    dtype: str | None, document: Mapping[str, Any], model: Mapping[str, Any] | None, default: str, *, runs: set[str]
) -> Precision:
    """The precision to train in: what was asked for, else the file's, else the model's, else the default.

    Args:
        dtype: as asked for.
        model: configuration of the model in transformers' form.
        runs: precisions that the machine has; a model in another is trained in the default.

    Raises:
        UsageError: the file enables another one than was asked for, or one that the machine lacks.
    """
    said = precision_of(document)
    if dtype is not None:
        if said is not None and said != dtype:
            words = f"enables {said}" if said != "fp32" else "enables neither fp16 nor bf16"
            raise UsageError(f"`dtype={dtype}` contradicts `ds_config`, which {words}; leave one out")
        return Precision(dtype=dtype, origin="`dtype`")
    if said is not None:
        if said not in runs:
            raise UsageError(
                f"`ds_config` enables {said}, which is not to be had here; train in {default}, or where it is"
            )
        return Precision(dtype=said, origin="`ds_config`")
    named = _dtype_of_model(model)
    if named in runs:
        return Precision(dtype=named, origin=MODELS_OWN)
    return Precision(dtype=default, origin=f"the default on a {'GPU' if 'fp16' in runs else 'CPU'}")


def _dtype_of_model(model: Mapping[str, Any] | None) -> str:
    """Precision that a model's configuration names, its language model's where it has several; empty for none."""
    for block in (model or {}, (model or {}).get("text_config")):
        if isinstance(block, Mapping):
            name = block.get("dtype") or block.get("torch_dtype")
            if isinstance(name, str):
                return MODEL_DTYPES.get(name.removeprefix("torch."), "")
    return ""


def own_configuration(file: DsFile, dtype: str, machine: Machine) -> OwnConfiguration:
    """The configuration of a file as it stands; what it leaves open is as in untuned training.

    Raises:
        UsageError: its batch sizes contradict each other.
    """
    document, notes = file.document, []
    zero = stated(document, "zero_optimization", {})
    said_stage = stated(zero, "stage", None)
    stage = int(said_stage or 0)
    if forgets_loss_scale(stage, dtype):
        stage = 1
        if said_stage is not None:
            notes.append("In fp16 DeepSpeed loses its gradients at the ZeRO stage 0 of `ds_config`; 1 stands for it.")
    micro_batch, accumulation, is_whole = _batch_sizes(document, machine.ranks, notes)
    knobs = knobs_of(document, zero_stage=stage) if machine.device == "cuda" else {}
    says_batch = any(stated(document, key, None) is not None for key in BATCH_KEYS)
    if said_stage is None and not says_batch and not knobs:
        return OwnConfiguration(config=None, holds_batch=False, notes=tuple(notes))
    core = {"zero_stage": stage, "micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    return OwnConfiguration(config=TrialConfig.from_json({**core, **knobs}), holds_batch=is_whole, notes=tuple(notes))


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch_sizes(document: Mapping[str, Any], ranks: int, notes: list[str]) -> tuple[int, int, bool]:
    """Micro-batch size and accumulation as DeepSpeed makes them of what is said, and whether that decides both.

    Raises:
        UsageError: they contradict each other on any number of ranks, or on this one.
    """
    total, micro_batch, accumulation = (stated(document, key, None) for key in BATCH_KEYS)
    if total is None:
        return micro_batch or 1, accumulation or 1, micro_batch is not None
    if micro_batch is not None and accumulation is not None and total != micro_batch * accumulation * ranks:
        if total % (micro_batch * accumulation) or total % (micro_batch * ranks):
            raise UsageError(
                f"`ds_config`: train_batch_size {total} is not {micro_batch} × {accumulation} on {ranks} ranks; "
                "leave out one of its batch sizes"
            )
        notes.append(
            f"`ds_config` is for {total // (micro_batch * accumulation)} ranks; on {ranks} its train_batch_size of "
            f"{total} takes gradient_accumulation_steps {total // (micro_batch * ranks)}."
        )
        return micro_batch, total // (micro_batch * ranks), True
    beside = (accumulation or 1) if micro_batch is None else micro_batch
    each, rest = divmod(total, ranks * beside)
    if rest or not each:
        raise UsageError(
            f"`ds_config`: train_batch_size {total} is no multiple of {beside} × {ranks} ranks; change its batch sizes"
        )
    return (each, accumulation or 1, True) if micro_batch is None else (micro_batch, accumulation or each, True)


def at_global_batch(own: TrialConfig, samples: int | None, ranks: int, *, whose: str) -> TrialConfig:
    """A configuration at the global batch that was asked for, if one was.

    Args:
        whose: who has it, for the message.

    Raises:
        UsageError: its micro-batches do not make that batch.
    """
    if samples is None:
        return own
    accumulation, rest = divmod(samples, own.micro_batch_size * ranks)
    if rest or not accumulation:
        raise UsageError(
            f"`global_batch={samples}` must be a multiple of the {whose} micro-batches, "
            f"{own.micro_batch_size} on each of {ranks} ranks"
        )
    return dataclasses.replace(own, gradient_accumulation_steps=accumulation)


def limits_around(own: TrialConfig, limits: Limits, *, holds_batch: bool) -> Limits:
    """Batch sizes to search, which a person's own are among; their global batch is the training, and may be held."""
    samples = own.global_batch_size(limits.ranks)
    return dataclasses.replace(
        limits,
        max_micro_batch=max(limits.max_micro_batch, own.micro_batch_size),
        max_global_batch=max(limits.max_global_batch, samples),
        global_batch=samples if holds_batch else limits.global_batch,
    )


def lets_batch_go(request: SearchRequest) -> bool:
    """Whether the global batch of a person's own configuration may change."""
    return getattr(request, "free_batch", False) or request.max_global_batch is not None


def file_notes(file: DsFile, precision: Precision, own: OwnConfiguration, limits: Limits) -> list[str]:
    """Lines on how a file was understood, and on what trials have otherwise."""
    document = file.document
    lines = [f"Precision: {precision.dtype}, from {precision.origin}."]
    if (config := own.config) is not None:
        batch = f"{config.micro_batch_size} × {config.gradient_accumulation_steps} × {limits.ranks}"
        samples = config.global_batch_size(limits.ranks)
        knobs = "".join(f", {field} {value}" for field, value in config.knobs_on.items())
        held = (
            "; that is held, and `free_batch` lets it go" if limits.global_batch == samples and own.holds_batch else ""
        )
        lines.append(
            f"The yardstick is `ds_config` as it stands: ZeRO-{config.zero_stage}{knobs}, {batch} = {samples} samples "
            f"a step{held}."
        )
    lines += own.notes
    if file.rewritten:
        lines.append(f"In `ds_config`, read in today's form: {', '.join(file.rewritten)}.")
    if unknown := unknown_keys(document):
        lines.append(f"DeepSpeed does not know, and ignores, of `ds_config`: {', '.join(unknown)}.")
    if off := switched_off(document):
        lines.append(f"Off in trials, kept in what is exported: {', '.join(off)}.")
    if has_open_schedule(document):
        lines.append('The scheduler has values "auto", which only the Trainer knows: trials train without it.')
    return lines


def own_of(file: DsFile, workload: Workload, machine: Machine, request: SearchRequest) -> OwnConfiguration:
    """`own_configuration`, at the global batch that was asked for if one was.

    Raises:
        UsageError: see there, and `at_global_batch`.
    """
    own = own_configuration(file, workload.dtype, machine)
    if own.config is None:
        return own
    config = own.config
    if request.global_batch is not None and own.holds_batch:
        config = at_global_batch(config, request.global_batch, machine.ranks, whose="file's")
    elif request.global_batch is not None:
        config = dataclasses.replace(
            config,
            micro_batch_size=1,
            gradient_accumulation_steps=max(request.global_batch // machine.ranks, 1),
        )
    return dataclasses.replace(own, config=config)
