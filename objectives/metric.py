"""Metrics a study may maximise and report: a table with an entry each, as knobs have theirs.

Every metric is samples/s times a positive constant of one workload and machine. That is why the search, the rules that
stop hopeless trials, the verification and the ranking all work on samples/s, whatever is asked for: the order is alike.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from ds_tune.objectives.cost_model.architecture import architecture_of
from ds_tune.objectives.cost_model.hardware import TERA, hardware_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.workload.kinds import Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricContext:
    """The constants that turn samples/s into a metric."""

    ranks: int
    tokens_per_sample: float | None
    """Padding apart; the mean where samples differ in length. None where they have none."""
    flops_per_sample: float | None
    """Model FLOPs of a sample's forward and backward pass; None where the model's sizes are not known."""
    peak_flops: float | None
    """FLOP a second that one GPU can do in the workload's precision; None on a CPU or an unknown GPU."""
    peak_source: str = ""
    """The peak in words with its origin; empty without a peak."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One way to say how fast a configuration trains."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    of: Callable[[float, MetricContext], float | None]
    """From samples/s: that times a positive constant; None where the context lacks what it needs."""
    shown: str
    """Format of a value in tables."""

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Optuna's word for what is better."""
        return "maximize" if self.better == "higher" else "minimize"

    def words(self, value: float | None) -> str:
        """A value as tables show it; a dash where it is unknown."""
        return "–" if value is None else format(value, self.shown)

    def unit_on(self, device: str) -> str:
        """The unit, which on a CPU is a rank's rather than a GPU's."""
        return self.unit.replace("a GPU", "a rank") if device == "cpu" else self.unit


def _tokens_per_second(rate: float, context: MetricContext) -> float | None:
    return None if context.tokens_per_sample is None else rate * context.tokens_per_sample


def _per_rank(value: float | None, context: MetricContext) -> float | None:
    return None if value is None else value / context.ranks


def _tflops_per_gpu(rate: float, context: MetricContext) -> float | None:
    if context.flops_per_sample is None:
        return None
    return rate * context.flops_per_sample / context.ranks / TERA


def _mfu(rate: float, context: MetricContext) -> float | None:
    """Model FLOPs utilization: model FLOPs over what the GPUs could do (PaLM, appendix B)."""
    if context.flops_per_sample is None or context.peak_flops is None:
        return None
    return rate * context.flops_per_sample / context.ranks / context.peak_flops


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="samples_per_second", unit="samples/s", better="higher", shown=".2f",
            of=lambda rate, context: rate,
        ),
        Metric(
            name="tokens_per_second", unit="tokens/s", better="higher", shown=".0f",
            of=_tokens_per_second,
        ),
        Metric(
            name="tokens_per_second_per_gpu", unit="tokens/s a GPU", better="higher", shown=".0f",
            of=lambda rate, context: _per_rank(_tokens_per_second(rate, context), context),
        ),
        Metric(name="tflops_per_gpu", unit="TFLOP/s a GPU", better="higher", shown=".4g", of=_tflops_per_gpu),
        Metric(name="mfu", unit="MFU", better="higher", shown=".1%", of=_mfu),
    )
}  # fmt: skip
"""Every metric by its name, in the order of tables and columns."""

DEFAULT_METRIC = "samples_per_second"


def all_metrics(samples_per_second: float, context: MetricContext) -> dict[str, float | None]:
    """Value of every metric by its name; None where what it needs is not known."""
    return {name: metric.of(samples_per_second, context) for name, metric in METRICS.items()}


def metric_context(workload: Workload, machine: Machine, flops_per_sample: float = 0.0) -> MetricContext:
    """The constants of a workload on a machine.

    Args:
        flops_per_sample: as a trial measured it; 0, as in recordings, for what the model's configuration says.
    """
    hardware = hardware_of(machine)
    peak, source = None, ""
    if hardware.device == "cuda" and hardware.is_known:
        peak = hardware.accelerator.peak_flops(workload.dtype)
        source = f"{peak / TERA:.4g} TFLOP/s, data sheet of {hardware.accelerator.name}, {workload.dtype}"
    return MetricContext(
        ranks=machine.ranks,
        tokens_per_sample=workload.counted_tokens_per_sample,
        flops_per_sample=flops_per_sample or _flops_per_sample(workload),
        peak_flops=peak,
        peak_source=source,
    )


def _flops_per_sample(workload: Workload) -> float | None:
    try:
        architecture = architecture_of(workload)
    except UsageError:  # its sizes are not known
        return None
    tokens = workload.tokens_per_sample
    return None if tokens is None else architecture.flops_per_sample(tokens)


def check_metric(name: str, workload: Workload, machine: Machine) -> None:
    """
    Raises:
        UsageError: the metric has no value for this workload on this machine.
    """
    if name == DEFAULT_METRIC:
        return  # asks for nothing, not even a hub
    context = metric_context(workload, machine)
    if METRICS[name].of(1.0, context) is not None:
        return
    before = list(METRICS)[: list(METRICS).index(name)]
    known = [each for each in before if METRICS[each].of(1.0, context) is not None]
    unknown = f"the FLOPs of {workload.title} are"
    if context.flops_per_sample is not None:
        unknown = f"the peak FLOP/s of {'a CPU' if machine.device == 'cpu' else machine.name} is"
    raise UsageError(f"`metric={name}`: {unknown} not known; use `metric={known[-1]}`")
