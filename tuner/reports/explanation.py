"""Why the best configuration is as fast as it is, and what would make it faster: sentences from a summary."""

import dataclasses
import math
import statistics

from ds_tune.objectives.cost_model.hardware import Hardware, hardware_of
from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import KNOBS, Measurement, TrialConfig, has_meaning
from ds_tune.storage.records import StudySummary, TrialRecord

WORTH_SAYING = 0.01
"""A predicted gain below this is within the noise of a step."""

FIRST_STEPS_WORTH_SAYING_SECONDS = 1.0
BOTTLENECKS = {
    "compute": "computing",
    "launch": "launching kernels, for which the GPU waits",
    "communication": "communication between the ranks",
    "optimizer": "the optimizer's step",
}


def explanation_lines(summary: StudySummary) -> list[str]:
    """The sentences of a report, most important first; none where nothing ran."""
    best = summary.best
    if best is None or not isinstance(best.outcome, Measurement):
        return []
    lines = []
    try:
        model = CostModel(summary.workload, hardware_of(summary.machine))
    except UsageError:  # sizes that are not known: there is no model of it
        model = None
    if model is not None:
        lines.append(bottleneck_words(best, best.outcome, model))
    lines += contribution_lines(best, summary)
    if (words := first_steps_words(summary)) is not None:
        lines.append(words)
    lines = [f"{summary.provenance.mark(line.removesuffix('.'))}." for line in lines]
    if model is not None:
        lines += next_step_lines(best.config, model, knob_context_of(summary.workload, summary.machine))
    return lines


def bottleneck_words(best: TrialRecord, measured: Measurement, model: CostModel) -> str:
    """Says what the largest part of a step goes to. The optimizer's share is measured, the others are the model's."""
    step = model.predict(best.config).step
    optimizer = measured.optimizer_seconds / statistics.fmean(measured.step_seconds)
    others = {
        "compute": step.compute + step.hooks if step.compute >= step.launch else 0.0,
        "launch": step.launch + step.hooks if step.launch > step.compute else 0.0,
        "communication": step.communication,
    }
    rest = math.fsum(others.values())
    shares = {name: (1 - optimizer) * seconds / rest for name, seconds in others.items()} | {"optimizer": optimizer}
    largest = max(shares, key=lambda name: shares[name])
    part = "Most" if shares[largest] > 0.5 else "The largest part"
    words = f"{part} of a step of {best.config.name}, about {shares[largest]:.0%}, goes to {BOTTLENECKS[largest]}"
    if model.hardware.device == "cuda" and model.hardware.is_known:
        # A recording does not tell it.
        flops = measured.flops_per_sample or model.architecture.flops_per_sample(model.seq_len)
        reached = measured.samples_per_second * flops / model.hardware.ranks
        peak = model.hardware.accelerator.peak_flops(model.workload.dtype)
        words += f"; each GPU does {reached / 1e12:.0f} of its {peak / 1e12:.0f} TFLOP/s"
    return f"{words}."


def contribution_lines(best: TrialRecord, summary: StudySummary) -> list[str]:
    """Lines on what each setting of the winner brings, measured where it was."""
    found = summary.contributions
    if found is None or found.winner != best.config.name:
        return []
    lines = []
    for each in found.ablations:
        value = getattr(best.config, each.field)
        setting = f"{each.field} {value} rather than {each.value}"
        if each.samples_per_second is None:
            lines.append(f"{setting} makes it run ({each.name}: {each.reason}).")
        else:
            # Relative only: the rates may be of other processes than the verified ones.
            gain = each.winner_samples_per_second / each.samples_per_second - 1
            words = gain_words(gain, each.noise, disturbed=summary.disturbance is not None)
            faster = math.log1p(gain) < -(each.noise or WORTH_SAYING) and each.name not in summary.verification
            lines.append(f"{setting} {words} (beside {each.name}{', which was not verified' if faster else ''}).")
    if found.importances:
        shares = ", ".join(f"{field} {share:.0%}" for field, share in found.importances.items())
        lines.append(f"Not all of it was measured one by one; by Optuna's importance of the trials: {shares}.")
    return lines


def gain_words(gain: float, noise: float | None = None, *, disturbed: bool = False) -> str:
    """Says what a setting does to samples/s, as a verb with its object.

    Args:
        noise: half the 95% interval of the logarithm of 1 + gain; None where that is not known.
        disturbed: something else used the machine, so that the noise is worth saying.
    """
    if disturbed and noise is not None:
        if abs(math.log1p(gain)) < noise:
            return f"changes nothing beyond the noise of ± {percent_words(math.expm1(noise), noise)}"
        uncertainty = f" ± {percent_words((1 + gain) * noise, (1 + gain) * noise)}"
    else:
        uncertainty = ""
        if abs(gain) < max(WORTH_SAYING, noise or 0.0):
            return f"changes little, {gain:+.1%}"
    amount = percent_words(abs(gain), (1 + gain) * (noise or 0.0)) + uncertainty
    return f"brings {amount}" if gain > 0 else f"costs {amount}"


def percent_words(fraction: float, noise: float) -> str:
    """A percentage with no more digits than two of the noise's, and at most one after the point."""
    digits = 1 - math.floor(math.log10(100 * noise)) if noise > 0 else 1
    return f"{round(100 * fraction, min(digits, 1)):.{min(max(digits, 0), 1)}f}%"


def first_steps_words(summary: StudySummary) -> str | None:
    """After how many steps the best has made up for its slow first ones; None where they cost next to nothing."""
    best, baseline = summary.best, summary.baseline
    if best is None or baseline is None or best is baseline:
        return None
    costs = []
    for record in (best, baseline):
        assert isinstance(record.outcome, Measurement)
        runs = [record.outcome, *summary.verification.get(record.config.name, ())]
        # The most of several runs, for a compiler that finds its earlier work in a cache costs little.
        costs.append(max(run.first_steps_seconds for run in runs))
    extra = costs[0] - max(costs[1], 0.0)
    if extra < FIRST_STEPS_WORTH_SAYING_SECONDS:
        return None
    assert best.samples_per_second and baseline.samples_per_second
    samples = best.config.global_batch_size(best.machine.ranks)
    saved = samples / baseline.samples_per_second - samples / best.samples_per_second
    if saved <= 0:
        return None
    steps = math.ceil(extra / saved)
    why = " (compilation)" if best.config.compile != "off" else ""
    return (
        f"Its first steps take {costs[0]:.0f} s longer than later ones{why}, which pays off after "
        f"{steps} {'step' if steps == 1 else 'steps'}."
    )


def next_step_lines(config: TrialConfig, model: CostModel, context: KnobContext) -> list[str]:
    """Lines on what other numbers or other hardware are predicted to bring; nothing of it was run."""
    now = model.predict(config).step.samples_per_second
    lines = []
    for field, knob in KNOBS.items():
        if knob.numerics is None or field in config.knobs_on:
            continue
        changed = {value: TrialConfig.from_json({**config.to_json(), field: value}) for value in knob.values}
        changed = {
            value: other for value, other in changed.items() if has_meaning(field, dataclasses.asdict(other), context)
        }
        if not changed:
            continue
        gains = {value: _rate(other, model) / now - 1 for value, other in changed.items()}
        value = max(gains, key=lambda each: gains[each])
        if gains[value] >= WORTH_SAYING:
            lines.append(
                f"`allow=numerics:{field}` ({value}) is predicted to bring {gains[value]:.0%}; {knob.numerics}."
            )
    hardware = model.hardware
    if hardware.device == "cuda":
        twice = dataclasses.replace(hardware, ranks=2 * hardware.ranks)
        lines.append(f"Twice the GPUs are predicted to train {_rate(config, model, twice) / now:.2f} times as fast.")
        larger = dataclasses.replace(config, micro_batch_size=2 * config.micro_batch_size)
        needs = model.predict(larger).memory.peak_bytes
        if needs > hardware.capacity_bytes and (gain := _rate(larger, model) / now - 1) >= WORTH_SAYING:
            lines.append(
                f"Memory is the limit: a micro-batch of {larger.micro_batch_size} is predicted to bring {gain:.0%} "
                f"and to need {needs / GIB:.0f} GiB of the {hardware.capacity_bytes / GIB:.0f} GiB there are."
            )
    return lines


def _rate(config: TrialConfig, model: CostModel, hardware: Hardware | None = None) -> float:
    """Samples/s by the formulas, here or on other hardware."""
    there = CostModel(model.workload, hardware, architecture=model.architecture) if hardware else model
    return there.predict(config).step.samples_per_second
