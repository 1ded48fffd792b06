"""How long each phase of a trial may take before it is taken for hung: from its predicted cost, with slack."""

SLACK = 5.0
"""A phase that takes five times what was predicted is not slow but stuck."""

BUILD_SECONDS = {"config": 60.0, "model": 180.0, "engine": 300.0}
"""Phases whose cost hardly depends on the configuration: seconds, where nothing is stuck or compiled."""

FIRST_STEP_SECONDS = 60.0
"""The first step also compiles kernels, finds workspaces and makes connections."""

WHOLE_COMPILATION_SECONDS = {"model": 240.0, "deepcompile": 480.0}
"""Seconds of compiling a model as a whole, which grow with its layers; DeepCompile does it twice at stage 3."""

SLOWEST_FLOPS = {"cuda": 2e12, "cpu": 1e9}
"""FLOP a second that a rank achieves at the very least, for a prediction before anything was measured."""


def predicted_step_seconds(
    *, samples: int, seconds_per_sample: float | None, flops_per_sample: float, device: str
) -> float:
    """Seconds of one optimizer step, rather too many.

    Args:
        samples: of one rank in one step.
        seconds_per_sample: the slowest that any trial of this study took for a sample of one rank, if there was one.
        device: `cuda` or `cpu`.
    """
    return samples * (seconds_per_sample or flops_per_sample / SLOWEST_FLOPS[device])


def warmup_deadline(step_seconds: float, steps: int, compile: str = "off") -> float:
    """For the warm-up, given the prediction for one step and how the model is compiled (the knob's value)."""
    return FIRST_STEP_SECONDS + WHOLE_COMPILATION_SECONDS.get(compile, 0.0) + SLACK * steps * step_seconds


def timed_deadline(step_seconds: float, steps: int) -> float:
    """For the timed steps, given what one is expected to take."""
    return 10.0 + SLACK * steps * step_seconds
