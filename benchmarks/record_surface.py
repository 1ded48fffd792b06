"""Records what every configuration of a grid does on this machine, for `ds-tune --replay` and `benchmarks/search.py`.

    python benchmarks/record_surface.py FILE [--memory-cap 32GiB] [--seconds 500] [--stage 0 1 2 3] [--mbs …] …

One JSON line a configuration after a header line (see docs/surfaces.md). The same command goes on where it was cut
off. Beyond half as much again as a micro-batch that ran out of memory, larger ones are left out.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.machine import GIB, Machine, detect_machine, software_versions
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import (
    KNOBS,
    Failure,
    FailureKind,
    Measurement,
    Outcome,
    TrialConfig,
    has_meaning,
)
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.backend import DEFAULTS
from ds_tune.tuner.request import parse_memory

PLAN = StepPlan(min_timed_steps=3, max_timed_steps=12, timed_seconds=1.2, precision=0.005, short_step_seconds=0.0)
"""Many configurations in little time: steps of one configuration differ by 1 to 3%."""

BEYOND_OOM = 1.5


def header(workload: HuggingFaceWorkload, machine: Machine) -> dict[str, Any]:
    """The line that says what the rest was measured on."""
    name = machine.name.replace("NVIDIA ", "") if machine.device == "cuda" else "CPU"
    return {
        "hardware": f"{machine.ranks}x{name}",
        "ranks": machine.ranks,
        "memory_cap_gib": round(machine.capacity_bytes / GIB, 2),
        "model": workload.model,
        "seq_len": workload.seq_len,
        "dtype": workload.dtype,
        "versions": software_versions(),
    }


def line(config: TrialConfig, outcome: Outcome, trial_s: float) -> dict[str, Any]:
    """Record of one configuration."""
    row: dict[str, Any] = {
        "stage": config.zero_stage,
        "mbs": config.micro_batch_size,
        "gas": config.gradient_accumulation_steps,
        "ckpt": config.activation_checkpointing,
        **{field: value for field, value in config.knobs_on.items() if field != "activation_checkpointing"},
        "oom": False,
        "trial_s": round(trial_s, 3),
    }
    match outcome:
        case Measurement():
            row |= {
                "step_s": round(statistics.fmean(outcome.step_seconds), 6),
                "samples_per_s": round(outcome.samples_per_second, 4),
                "samples_per_s_ci95": [round(end, 4) for end in outcome.samples_per_second_ci95],
                "peak_gib": round(outcome.peak_memory_bytes / GIB, 4),
                "reserved_gib": round(outcome.reserved_memory_bytes / GIB, 4),
                "steps_s": [round(seconds, 5) for seconds in outcome.step_seconds],
                "warmup_s": [round(seconds, 5) for seconds in outcome.warmup_step_seconds],
                "first_steps_s": round(outcome.first_steps_seconds, 5),
                "forward_s": round(outcome.forward_seconds, 5),
                "backward_s": round(outcome.backward_seconds, 5),
                "optimizer_s": round(outcome.optimizer_seconds, 5),
                "setup_s": round(outcome.setup_seconds, 3),
                "alloc_retries": outcome.alloc_retries,
            }
        case Failure():
            row["oom"] = outcome.kind is FailureKind.OUT_OF_MEMORY
            row |= {"failure": outcome.kind.value, "phase": outcome.phase}
            if outcome.peak_memory_bytes is not None:
                row["peak_gib"] = round(outcome.peak_memory_bytes / GIB, 4)
            if not row["oom"]:
                row["message"] = outcome.message
    return row


def grid(arguments: argparse.Namespace, context: KnobContext) -> list[TrialConfig]:
    """All configurations in the order given: gas slowest, so that a record that is cut off is still a full grid.

    Those with a knob that has no meaning there are left out: without it they are other lines of the grid.
    """
    configs = [
        TrialConfig(
            zero_stage=stage,
            micro_batch_size=mbs,
            gradient_accumulation_steps=gas,
            activation_checkpointing=ckpt,
            **knobs,
        )
        for gas, knobs, ckpt, stage, mbs in itertools.product(
            arguments.gas, arguments.knobs, arguments.ckpt, arguments.stage, arguments.mbs
        )
        if mbs * gas <= arguments.max_samples
    ]
    return [
        config
        for config in configs
        if all(has_meaning(field, dataclasses.asdict(config), context) for field in config.knobs_on)
    ]


def kind_of(row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The stage and the knobs of a recorded line."""
    knobs = {field: row[field] for field in KNOBS if field in row}
    return row["stage"], {**({"activation_checkpointing": row["ckpt"]} if row["ckpt"] else {}), **knobs}


def knobs_from(text: str) -> dict[str, Any]:
    """An argparse type: `compile=blocks,padded_vocabulary=64`, or `none`."""
    knobs: dict[str, Any] = {}
    for word in [] if text == "none" else text.split(","):
        name, _, value = word.partition("=")
        if name not in KNOBS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(KNOBS)}")
        knobs[name] = int(value) if isinstance(KNOBS[name].off, int) else value
    return knobs


def beyond(config: TrialConfig, rows: list[dict[str, Any]]) -> bool:
    """Whether a much smaller micro-batch of the same kind has run out of memory."""
    return any(
        row["oom"]
        and kind_of(row) == (config.zero_stage, config.knobs_on)
        and config.micro_batch_size > BEYOND_OOM * row["mbs"]
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--memory-cap")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no configuration after so long")
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64])
    parser.add_argument("--gas", type=int, nargs="+", default=[1, 4, 2, 8])
    parser.add_argument("--ckpt", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--knobs", type=knobs_from, nargs="+", default=[{}], metavar="NAME=VALUE,…", help="each a set of knobs, or none"
    )
    parser.add_argument("--max-samples", type=int, default=64, help="of a rank in one step")
    arguments = parser.parse_args()
    started = time.monotonic()
    cap = parse_memory(arguments.memory_cap) if arguments.memory_cap else None
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=2, memory_cap_bytes=cap)
    defaults = DEFAULTS[machine.device]
    workload = HuggingFaceWorkload(
        model=arguments.model or defaults.model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
    )
    if not arguments.file.exists():
        arguments.file.write_text(json.dumps(header(workload, machine)) + "\n")
    first, *lines = arguments.file.read_text().splitlines()
    if json.loads(first) != header(workload, machine):
        print(f"{arguments.file} was recorded on something else: {first}", file=sys.stderr)
        return 2
    rows = [json.loads(text) for text in lines]
    known = {(str(kind_of(row)), row["mbs"], row["gas"]) for row in rows}
    folder = Path(tempfile.mkdtemp(prefix="surface-"))
    launcher = LocalLauncher(machine)
    objective = DeepSpeedObjective(
        workload,
        machine,
        launcher=launcher,
        log_folder=folder,
        trial_seconds=120,
        plan=PLAN,
        notice=lambda text: print(text, file=sys.stderr, flush=True),
    )
    try:
        configs = grid(arguments, knob_context_of(workload, machine))
        objective.prepare(configs)
        warm = TrialConfig(zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1)
        objective.run(warm, folder, lambda phase: None)  # the first trial of a process takes seconds longer
        for config in configs:
            kind = str((config.zero_stage, config.knobs_on))
            key = (kind, config.micro_batch_size, config.gradient_accumulation_steps)
            if key in known or beyond(config, rows):
                continue
            if time.monotonic() - started > arguments.seconds:
                break
            begun = time.monotonic()
            outcome = objective.run(config, folder, lambda phase: None)
            rows.append(line(config, outcome, time.monotonic() - begun))
            with arguments.file.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        objective.close()
        launcher.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
