"""Which parameters ZeRO-3 may release behind a module, found in linear time.

In the first micro-step that follows its recorded trace, DeepSpeed 0.19.8 looks for each module through all that run
behind it, parameter by parameter, for those that are soon needed again. The answers are kept, so that training pays for
it once; but every trial of stage 3 would. For GPT2-xl it took 2.5 to 6 s on hosts of H200s; 48 blocks took 12 s on a
slow processor, and with an index of the trace, which gives the same answers, under one:
docs/log/2026-11-25-zero3-second-micro-step.md.
"""

import bisect
import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils.z3_leaf_module import z3_leaf_module

MANGLED = "_PartitionedParameterCoordinator__"
METHOD = f"{MANGLED}params_to_release"
NEEDED = ("submodule_order", "most_recent_step_id_param_fetched_for", "max_reuse_dist_in_numel")
INDEX = "_ds_tune_trace_index"


@dataclasses.dataclass(frozen=True, slots=True)
class TraceIndex:
    """One recorded trace."""

    order: Sequence[torch.nn.Module]
    """Modules as they run, forward and backward."""
    elements_before: Sequence[int]
    """Parameters of all modules that run before each."""
    uses: dict[int, list[int]]
    """By a parameter's number: where in the order it is needed, ascending."""

    @classmethod
    def of(cls, order: Sequence[torch.nn.Module]) -> "TraceIndex":
        before, uses = [0], collections.defaultdict(list)
        for step, module in enumerate(order):
            elements = 0
            for parameter in iter_params(module):
                uses[parameter.ds_id].append(step)
                elements += parameter.ds_numel
            before.append(before[-1] + elements)
        return cls(order, before, dict(uses))

    def is_needed_within(self, parameter: int, step: int, elements: int) -> bool:
        """Whether a parameter is needed again from a step on, before so many elements of others have been."""
        uses = self.uses.get(parameter, [])
        at = bisect.bisect_left(uses, step)
        return at < len(uses) and self.elements_before[uses[at]] - self.elements_before[step] < elements


def params_to_release(coordinator: Any, submodule: torch.nn.Module, step_id: int) -> set[int]:
    """As `PartitionedParameterCoordinator.__params_to_release`, for modules that are no leaf of ZeRO-3's."""
    if not coordinator.is_complete_trace():
        raise RuntimeError("expected trace to be complete")
    order, fetched, reuse_elements = (getattr(coordinator, MANGLED + name) for name in NEEDED)
    index = getattr(coordinator, INDEX, None)
    if index is None or index.order is not order:
        index = TraceIndex.of(order)
        setattr(coordinator, INDEX, index)
    return {
        parameter.ds_id
        for parameter in iter_params(submodule)
        if not parameter.ds_persist
        and fetched[parameter] <= step_id
        and not index.is_needed_within(parameter.ds_id, step_id, reuse_elements)
    }


def install() -> None:
    """Puts it in the place of DeepSpeed's; one that looks different inside is left alone."""
    theirs = getattr(PartitionedParameterCoordinator, METHOD, None)
    if theirs is None or hasattr(theirs, "of_deepspeed"):
        return

    @functools.cache  # as theirs: the set is the caller's, who adds to it
    def ours(coordinator: Any, submodule: torch.nn.Module, step_id: int) -> set[int]:
        if z3_leaf_module(submodule) or not all(hasattr(coordinator, MANGLED + name) for name in NEEDED):
            found: set[int] = theirs(coordinator, submodule, step_id)
            return found
        return params_to_release(coordinator, submodule, step_id)

    ours.of_deepspeed = theirs  # type: ignore[attr-defined]
    setattr(PartitionedParameterCoordinator, METHOD, ours)
