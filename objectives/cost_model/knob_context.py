"""What a machine and a model decide about knobs: the `KnobContext` of a study."""

import dataclasses
import importlib.util

from ds_tune.objectives.cost_model.architecture import architecture_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.loss_scale import forgets_loss_scale
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.workload.kinds import Workload


def knob_context_of(workload: Workload, machine: Machine) -> KnobContext:
    """What decides on this machine, for this model, which knobs have a meaning."""
    major, _, minor = (machine.compute_capability or "0.0").partition(".")
    context = KnobContext(
        device=machine.device,
        ranks=machine.ranks,
        flash_attention=int(major) >= 8 and importlib.util.find_spec("flash_attn") is not None,
        liger=importlib.util.find_spec("liger_kernel") is not None,
        compute_capability=(int(major), int(minor)),
        dtype=workload.dtype,
        stage_0_trains=not forgets_loss_scale(0, workload.dtype),
        pretrained=workload.weights_are_loaded,
        out_of_reach=workload.out_of_reach,
    )
    try:
        architecture = architecture_of(workload)
    except UsageError:
        return context
    width, moments = (4, 8) if workload.dtype == "fp32" else (2, 12)  # bytes of a weight, of its optimizer's states
    states_bytes = width * architecture.parameters + moments * architecture.trained_parameters / machine.ranks
    return dataclasses.replace(
        context,
        states_share=states_bytes / machine.capacity_bytes,
        vocabulary=0 if architecture.is_masked else architecture.vocabulary,
        model_type=architecture.model_type,
        grouped_queries=architecture.key_value_heads != architecture.heads,
    )
