"""Rescue of a space of which nothing is predicted to fit: what saves memory is added to it, as little as suffices."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import KNOBS, TrialConfig, has_meaning
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.tuner.dimensions import knob_choices, knob_dimension, stage_and_batch_dimensions, zero_stages
from ds_tune.tuner.proposer import Proposer
from ds_tune.tuner.space import Space

LIKELY = 0.5
"""A configuration is said to fit when that is likelier than not, as in a plan."""

WORDS = {
    "activation_checkpointing": "activation checkpointing",
    "offload_optimizer": "the optimizer on the host",
    "offload_parameters": "ZeRO-3's parameters on the host",
}

HOST_STATE_BYTES = 16
"""Bytes on the host for each parameter whose optimizer is there (DeepSpeed's memory estimators)."""
HOST_PARAMETER_BYTES = 2
"""Besides them, for each parameter that is kept there."""

LEVELS = (
    ("activation_checkpointing",),
    ("offload_optimizer",),
    ("activation_checkpointing", "offload_optimizer"),
    ("activation_checkpointing", "offload_optimizer", "offload_parameters"),
)
"""Knobs to add, what costs the least speed first."""

MOST_RANKS = 4096
"""Where so many do not help, it is one sample's activations that are too large."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rescue:
    """What to search where nothing of what was asked for is predicted to fit."""

    space: Space
    said: str | None = None
    """One line for the person; None where nothing was wrong."""
    hint: str | None = None
    """Where nothing fits with all that saves memory either: what it would take."""


def rescued(
    space: Space,
    *,
    preset: str,
    allowed: Collection[str],
    workload: Workload,
    machine: Machine,
    listed: bool,
    host_bytes: int | None = None,
) -> Rescue:
    """The space, with what saves memory where that is needed.

    Args:
        listed: the person has listed the configurations: none is added.
        host_bytes: the host's memory that may be had; None where it is not known.
    """
    try:
        model = CostModel(workload, hardware_of(machine))
    except UsageError:  # nothing is known of the model
        return Rescue(space=space)
    if space.own is not None or _fits(model, space.legal):
        return Rescue(space=space)
    context = space.context if not listed else knob_context_of(workload, machine)
    for level in LEVELS:
        choices = knob_choices(preset, context, allowed)
        savings = {field: KNOBS[field].saving for field in level}
        if all(value in choices[field] for field, value in savings.items()):
            continue
        for field, value in savings.items():
            if value is not None and value not in choices[field] and field not in context.out_of_reach:
                choices[field] = (*choices[field], value)
        knobs = [knob_dimension(field, values) for field, values in choices.items()]
        larger = Space(space.limits, (*stage_and_batch_dimensions(context), *knobs), context=context)
        needs = _host_bytes(model, level)
        if (host_bytes is not None and needs > host_bytes) or not _fits(model, larger.legal):
            continue
        added = [WORDS[field] for field in level if any(field in each.knobs_on for each in larger.legal)]
        words = " and ".join(filter(None, [", ".join(added[:-1]), added[-1]]))
        if listed:
            return Rescue(space=space, hint=f"with {words} something is predicted to; list that, too")
        verb = "is" if len(added) == 1 else "are"
        takes = f", which takes about {needs / GIB:.0f} GiB of the host's memory" if needs else ""
        said = f"Nothing of what was asked for is predicted to fit: {words} {verb} searched, too{takes}."
        return Rescue(space=larger, said=said)
    return Rescue(space=space, hint=_what_it_takes(model, space, workload, machine))


def _host_bytes(model: CostModel, level: Sequence[str]) -> int:
    """Bytes of the host's memory that these knobs need."""
    states = HOST_STATE_BYTES * model.architecture.trained_parameters if "offload_optimizer" in level else 0
    parameters = HOST_PARAMETER_BYTES * model.architecture.parameters if "offload_parameters" in level else 0
    return states + parameters


def _fits(model: CostModel, configs: Sequence[TrialConfig]) -> bool:
    """Whether the smallest batches of any kind are likely to fit."""
    smallest: dict[tuple[object, ...], TrialConfig] = {}
    for config in configs:
        kind = (config.zero_stage, tuple(config.knobs_on.items()))
        held = smallest.get(kind)
        if held is None or _size(config) < _size(held):
            smallest[kind] = config
    _, memory = Proposer(model, list(smallest.values())).beliefs([])
    return bool((memory.fits >= LIKELY).any())


def _size(config: TrialConfig) -> tuple[int, int]:
    return config.micro_batch_size, config.gradient_accumulation_steps


def _what_it_takes(model: CostModel, space: Space, workload: Workload, machine: Machine) -> str:
    """How many such devices would do, with all that saves memory."""
    kind = "such ranks" if machine.device == "cpu" else "such GPUs"
    for ranks in _numbers(machine.ranks):
        hardware = dataclasses.replace(model.hardware, ranks=ranks)
        context = dataclasses.replace(knob_context_of(workload, machine), ranks=ranks)
        larger = CostModel(workload, hardware, architecture=model.architecture)
        if _fits(larger, list(_most_saving(context))):
            return f"with all that saves memory it would take {ranks} {kind}"
    return (
        "one sample of this length is too much for one of them however many there are; use a shorter `seq_len` or "
        "GPUs with more memory"
    )


def _numbers(ranks: int) -> Iterator[int]:
    """Numbers of devices that machines have: powers of two, and above eight whole nodes of eight."""
    for count in itertools.chain((1, 2, 4), range(8, 64, 8), (64 * 2**power for power in range(7))):
        if ranks < count <= MOST_RANKS:
            yield count


def _most_saving(context: KnobContext) -> Iterator[TrialConfig]:
    """One sample at each stage, with every combination of what saves memory and has a meaning there."""
    fields = [field for field, knob in KNOBS.items() if knob.saving is not None]
    for stage in zero_stages(context):
        for chosen in itertools.product((False, True), repeat=len(fields)):
            knobs = {field: KNOBS[field].saving for field, on in zip(fields, chosen, strict=True) if on}
            values = {field: knob.off for field, knob in KNOBS.items()} | {"zero_stage": stage} | knobs
            if all(has_meaning(field, values, context) for field in knobs):
                yield TrialConfig.from_json(
                    {"zero_stage": stage, "micro_batch_size": 1, "gradient_accumulation_steps": 1, **knobs}
                )
