"""How wrong the formulas of speed were where GPUs of a kind were recorded: the interval of a plan, before any trial.

A search begins with wider beliefs (`prior`): it has to leave room for a model that is like none of these.
"""

from ds_tune.objectives.cost_model.hardware import Hardware

RECORDED_KINDS = ("H100", "H200")
"""Accelerators of the surfaces in `benchmarks/data`, alone and two of them."""

RECORDED_ERRORS = {"compute": 0.13, "optimizer": 0.13, "launch": 0.345}
"""Logarithm of measured / predicted that 95% of the configurations stay within, by what takes most of a predicted step:
183 of compute (3% in the median), 194 of launches (11%), 3 of optimizers (`tests/objectives/cost_model`)."""


def recorded_error(hardware: Hardware, bottleneck: str) -> float | None:
    """Half the 95% interval of a rate's logarithm; None where nothing like it was recorded."""
    if hardware.accelerator.name not in RECORDED_KINDS or not hardware.is_known or hardware.nodes > 1:
        return None
    return RECORDED_ERRORS.get(bottleneck)
