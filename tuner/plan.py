"""`ds-tune plan`: what would fit and how fast it is predicted to be, on hardware that need not be here."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table

from ds_tune.objectives.cost_model.forecast import Forecast
from ds_tune.objectives.cost_model.hardware import Hardware, hardware_of, machine_of, parse_hardware
from ds_tune.objectives.cost_model.memory_calibration import usable_bytes
from ds_tune.objectives.cost_model.model import CostModel, Prediction
from ds_tune.objectives.cost_model.recorded_errors import recorded_error
from ds_tune.objectives.loss_scale import STAGE_0_LEFT_OUT, forgets_loss_scale
from ds_tune.objectives.machine import DEFAULT_CPU_RANKS, GIB, detect_machine
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.tuner.arguments import in_options
from ds_tune.tuner.backend import imagined_workload, limits_of
from ds_tune.tuner.proposer import Proposer
from ds_tune.tuner.request import PlanRequest
from ds_tune.tuner.space import Space
from ds_tune.tuner.spec import search_space

CERTAIN_ENOUGH = 0.5
"""A configuration is said to fit when that is likelier than not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One configuration of the plan."""

    config: TrialConfig
    forecast: Forecast
    prediction: Prediction

    def reason(self, hardware: Hardware) -> str:
        """Why it does not fit: what it needs of what there is, and what needs the most."""
        memory = self.prediction.memory
        if memory.step_bytes > memory.backward_bytes:
            parts = {
                "parameters": memory.parameters,
                "optimizer states": memory.optimizer_states,
                "the optimizer step's copies": memory.step_transient,
            }
        else:
            parts = {
                "parameters": memory.parameters + memory.gathered,
                "optimizer states": memory.optimizer_states,
                "gradients": memory.gradients,
                "activations": memory.activations,
                "logits and loss": memory.logits,
            }
        largest = sorted(parts, key=lambda name: -parts[name])[:2]
        needs = " and ".join(f"{parts[name] / GIB:.1f} GiB of {name}" for name in largest)
        for_tensors_bytes = hardware.capacity_bytes - hardware.outside_bytes
        usable = float(usable_bytes(for_tensors_bytes, memory.large_bytes)) / GIB
        left = f"about {usable:.1f}" if usable > 0 else "nothing"
        return (
            f"needs {self.forecast.peak_memory_bytes / GIB:.1f} GiB, of these {needs}, "
            f"and fragmentation leaves it {left}"
        )

    def to_json(self) -> dict[str, Any]:
        low, high = self.forecast.samples_per_second_ci95
        memory = dataclasses.asdict(self.prediction.memory)
        return {
            "name": self.config.name,
            "config": self.config.to_json(),
            "predicted_samples_per_second": self.forecast.samples_per_second,
            "predicted_samples_per_second_ci95": [low, high],
            "predicted_peak_memory_bytes": self.forecast.peak_memory_bytes,
            "probability_of_fitting": self.forecast.probability_of_fitting,
            "bottleneck": self.prediction.step.bottleneck,
            "memory_bytes": memory,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Predictions for a workload on some hardware."""

    workload: Workload
    hardware: Hardware
    parameters: int
    is_exact: bool
    fitting: Sequence[PlanRow]
    """Configurations that are likely to fit, the fastest first."""
    refused: Sequence[PlanRow]
    """For each combination of the other knobs the smallest micro-batch that does not fit."""
    configurations: int
    said: str | None = None
    """What was added to the space that was asked for, since nothing of it fits."""
    hint: str | None = None
    """Where nothing fits: what it would take."""

    def to_json(self) -> dict[str, Any]:
        return {
            "figures": "predicted",
            "workload": self.workload.description,
            "hardware": self.hardware.name,
            "capacity_bytes": self.hardware.capacity_bytes,
            "model_parameters": self.parameters,
            "configurations": self.configurations,
            "added": self.said,
            "hint": self.hint,
            "fitting": [row.to_json() for row in self.fitting],
            "not_fitting": [{**row.to_json(), "reason": row.reason(self.hardware)} for row in self.refused],
        }


def plan_of(request: PlanRequest, *, each_accumulation: bool = True) -> Plan:
    """The plan that a request asks for; see `make_plan`.

    Raises:
        UsageError: something asked for cannot be, or is not known.
    """
    hardware = _hardware_of(request)
    model = CostModel(imagined_workload(request, hardware), hardware)
    machine = machine_of(hardware)
    rescue = search_space(request, limits_of(request, machine), workload=model.workload, machine=machine)
    plan = make_plan(model, rescue.space, best=request.best, each_accumulation=each_accumulation)
    return dataclasses.replace(plan, said=rescue.said, hint=rescue.hint)


def _hardware_of(request: PlanRequest) -> Hardware:
    """The hardware that the request names, or this machine's."""
    cap = request.memory_cap_bytes
    if request.hardware is not None:
        return parse_hardware(request.hardware, memory_cap_bytes=cap)
    return hardware_of(detect_machine(gpus=None, cpu_ranks=DEFAULT_CPU_RANKS, memory_cap_bytes=cap))


def make_plan(model: CostModel, space: Space, *, best: int, each_accumulation: bool = True) -> Plan:
    """Predicts every configuration of the space and keeps the `best` fastest that fit.

    Args:
        each_accumulation: keep all gas of a micro-batch, and not only the best: they differ by fractions of a percent.
    """
    proposer = Proposer(model, space.legal)
    grid = proposer.grid
    rates, memory = proposer.beliefs([])

    def row(number: int) -> PlanRow:
        forecast, prediction = proposer.forecast(number, rates, memory), model.predict(grid.configs[number])
        error = recorded_error(model.hardware, prediction.step.bottleneck)
        if error is not None:
            rate = forecast.samples_per_second
            interval = (rate * math.exp(-error), rate * math.exp(error))
            forecast = dataclasses.replace(forecast, samples_per_second_ci95=interval)
        return PlanRow(config=grid.configs[number], forecast=forecast, prediction=prediction)

    fits = memory.fits >= CERTAIN_ENOUGH
    order = sorted((int(number) for number in fits.nonzero()[0]), key=lambda number: -rates.mean[number])
    if not each_accumulation:
        # Backwards, so that the fastest of each is the one that stays.
        chosen = {(_kind(config := grid.configs[number]), config.micro_batch_size): number for number in order[::-1]}
        order = sorted(chosen.values(), key=order.index)
    smallest: dict[tuple[Any, ...], int] = {}
    for number in (~fits).nonzero()[0]:
        config = grid.configs[number]
        kind = _kind(config)
        held = smallest.get(kind)
        if held is None or _size(config) < _size(grid.configs[held]):
            smallest[kind] = int(number)
    return Plan(
        workload=model.workload,
        hardware=model.hardware,
        parameters=model.architecture.parameters,
        is_exact=model.architecture.is_exact,
        fitting=[row(number) for number in order[:best]],
        refused=[row(smallest[kind]) for kind in sorted(smallest)],
        configurations=len(grid),
    )


def _kind(config: TrialConfig) -> tuple[Any, ...]:
    """Everything but the batch sizes."""
    return config.zero_stage, str(config.knobs_on)


def _size(config: TrialConfig) -> tuple[int, int]:
    return config.micro_batch_size, config.gradient_accumulation_steps


def print_plan(plan: Plan, console: rich.console.Console, *, details: bool = False) -> None:
    """The plan: what fits, the fastest first, and in one line what does not.

    Args:
        details: the memory of each, too, and of what does not fit.
    """
    capacity = plan.hardware.capacity_bytes / GIB
    exactly = "" if plan.is_exact else "about "
    console.print(
        f"{plan.workload.description} on {plan.hardware.name} ({capacity:.1f} GiB a rank), "
        f"{exactly}{plan.parameters / 1e6:.0f}M parameters; {plan.configurations} configurations. "
        "Every figure is predicted.",
        soft_wrap=True,
    )
    if (nodes := plan.hardware.nodes_words) is not None:
        console.print(nodes, soft_wrap=True)
    if forgets_loss_scale(0, plan.workload.dtype):
        console.print(STAGE_0_LEFT_OUT, soft_wrap=True)
    if plan.said is not None:
        console.print(plan.said, soft_wrap=True)
    if plan.fitting:
        console.print(_speed_table(plan.fitting))
        if details:
            console.print(_memory_table("Their memory a rank, GiB", plan.fitting))
    else:
        hint = f" {plan.hint[0].upper()}{plan.hint[1:]}." if plan.hint else ""
        console.print(in_options(f"Nothing is predicted to fit, not even one sample a rank.{hint}"), soft_wrap=True)
    if plan.refused and not details:
        nearest = min(plan.refused, key=lambda row: row.forecast.peak_memory_bytes)
        if not plan.fitting:
            console.print(f"{nearest.config.name} {nearest.reason(plan.hardware)}.", soft_wrap=True)
        kinds = "1 kind" if len(plan.refused) == 1 else f"{len(plan.refused)} kinds"
        words = "of configurations do not fit with larger micro-batches, or at all; `details=True` lists them"
        console.print(in_options(f"{kinds} {words}, with all memory."), soft_wrap=True)
    if plan.refused and details:
        console.print(_memory_table("Does not fit: the smallest micro-batch of each kind, GiB", plan.refused))
        for row in plan.refused:
            console.print(f"{row.config.name} {row.reason(plan.hardware)}", soft_wrap=True)


def _speed_table(rows: Sequence[PlanRow]) -> rich.table.Table:
    table = rich.table.Table(
        title="Predicted to fit, the fastest first (fits: how probable that is)",
        title_justify="left",
        box=rich.box.SIMPLE,
    )
    table.add_column("configuration", no_wrap=True)
    table.add_column("global batch", justify="right")
    table.add_column("samples/s (95%)", justify="right", no_wrap=True)
    table.add_column("bound by")
    table.add_column("peak GiB", justify="right")
    table.add_column("fits", justify="right", no_wrap=True)
    for row in rows:
        low, high = row.forecast.samples_per_second_ci95
        table.add_row(
            row.config.name,
            str(row.prediction.step.samples),
            f"{_short(row.forecast.samples_per_second)} ({_short(low)}–{_short(high)})",
            row.prediction.step.bottleneck,
            f"{row.forecast.peak_memory_bytes / GIB:.1f}",
            f"{row.forecast.probability_of_fitting:.0%}",
        )
    return table


def _memory_table(title: str, rows: Sequence[PlanRow]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    table.add_column("configuration", no_wrap=True)
    for heading in ("params", "grads", "states", "activations", "logits", "step", "peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        memory = row.prediction.memory
        parts = (
            memory.parameters + memory.gathered,
            memory.gradients + memory.buckets,
            memory.optimizer_states,
            memory.activations,
            memory.logits,
            memory.step_transient,
            row.forecast.peak_memory_bytes,
        )
        table.add_row(row.config.name, *(f"{part / GIB:.1f}" for part in parts))
    return table


def _short(value: float) -> str:
    """Three significant digits."""
    digits = max(2 - math.floor(math.log10(value)), 0) if value > 0 else 0
    return f"{value:.{digits}f}"
