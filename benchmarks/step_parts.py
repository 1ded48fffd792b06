"""One configuration timed by short steps and by whole ones, in the same warm ranks: the error of `StepParts`.

    python benchmarks/step_parts.py [--model FILE --seq-len 4096 --dtype bf16 --gpus 2] --stage 2 --mbs 1 --gas 64
        [--steps 2] [--rounds 1] [--any-length]

Prints one JSON line: samples/s and the seconds of a whole step with their 95% intervals, both ways, the seconds that
were timed and those of the whole trial, and how far the parts are off the whole steps (`error`, of the means). Each
round times both, in turns; a first trial, which starts the ranks, is not counted. `--steps` is how many whole steps are
timed. `--any-length` treats every step as a long one: a small model on CPUs has no others. Exits with 1 where a trial
failed, or where the search would time whole steps of this configuration.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ds_tune.objectives.machine import GIB, detect_machine, software_versions
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.backend import DEFAULTS


class TrialFailed(Exception):
    """A trial gave no measurement."""


def figures(measured: Measurement, samples: int) -> dict[str, Any]:
    """Figures of a whole step from one trial."""
    low, high = measured.samples_per_second_ci95
    parts = measured.from_parts
    warmup = sum(measured.warmup_step_seconds)
    figures: dict[str, Any] = {
        "step_s": samples / measured.samples_per_second,
        "step_s_ci95": [samples / high, samples / low if low > 0 else None],
        "samples_per_s": measured.samples_per_second,
        "samples_per_s_ci95": [low, high],
        "optimizer_s": measured.optimizer_seconds,
        "peak_gib": measured.peak_memory_bytes / GIB,
        "warmup_s": warmup,
        "timed_s": parts.timed_seconds if parts else sum(measured.step_seconds),
        "trial_s": measured.wall_seconds,
    }
    if parts:
        figures |= dataclasses.asdict(parts)
    else:
        figures["steps_s"] = list(measured.step_seconds)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--mbs", type=int, required=True)
    parser.add_argument("--gas", type=int, required=True)
    parser.add_argument("--ckpt", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--any-length", action="store_true")
    arguments = parser.parse_args()
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=2, memory_cap_bytes=None)
    defaults = DEFAULTS[machine.device]
    workload = HuggingFaceWorkload(
        model=arguments.model or defaults.model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
    )
    config = TrialConfig(
        zero_stage=arguments.stage,
        micro_batch_size=arguments.mbs,
        gradient_accumulation_steps=arguments.gas,
        activation_checkpointing=arguments.ckpt,
    )
    short = StepPlan(long_step_seconds=0.0) if arguments.any_length else StepPlan()
    whole = dataclasses.replace(PRECISE, min_timed_steps=arguments.steps, max_timed_steps=arguments.steps)
    samples = config.global_batch_size(machine.ranks)
    found: dict[str, list[dict[str, Any]]] = {"parts": [], "whole": []}
    with tempfile.TemporaryDirectory(prefix="step-parts-") as folder, LocalLauncher(machine) as launcher:
        objective = DeepSpeedObjective(
            workload, machine, launcher=launcher, log_folder=Path(folder), trial_seconds=600,
            notice=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip

        def time(plan: StepPlan) -> Measurement:
            objective.plan = plan
            outcome = objective.run(config, Path(folder), lambda phase: None)
            if not isinstance(outcome, Measurement):
                raise TrialFailed(f"{outcome.message}\n{outcome.log_tail}")
            return outcome

        try:
            objective.prepare([config])
            time(short)
            for _ in range(arguments.rounds):
                for name, plan in (("parts", short), ("whole", whole)):
                    found[name].append(figures(time(plan), samples))
        except TrialFailed as failure:
            print(failure, file=sys.stderr)
            return 1
        finally:
            objective.close()
    if "plain_seconds" not in found["parts"][0]:
        print(f"whole steps of {config.name} are timed in the search, too: they are short", file=sys.stderr)
        return 1
    means = {name: statistics.fmean(each["step_s"] for each in rounds) for name, rounds in found.items()}
    document = {
        "hardware": machine.description,
        "versions": software_versions(),
        "workload": workload.to_json(),
        "config": config.to_json(),
        "error": means["parts"] / means["whole"] - 1,
        **found,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
