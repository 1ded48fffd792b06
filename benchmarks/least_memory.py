"""How much more than its peak a configuration needs to run: the least cap it runs under, found by bisection.

    python benchmarks/least_memory.py FILE [--model gpt2-medium] [--gpus 1] [--seconds 500] STAGE/MBS/GAS/CKPT …

A caching allocator splits blocks, and a tensor may find no piece that is large enough though there is enough in all.
Each configuration is run under caps between its predicted peak and 1.18 times that, three of them, each in new
processes. One JSON line a run after a header line as of a surface, whose `memory_cap_gib` is the device's; the same
command goes on where it was cut off. The last lines print what was found, of the peaks that were measured.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record_surface import PLAN, header, line
from tabulate import tabulate

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB, Machine, detect_machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.backend import DEFAULTS

FACTORS = (1.0, 1.18)
"""Multiples of the predicted peak: a configuration is taken not to run under the first, and to run under the second."""
RUNS = 3


def config_from(text: str) -> TrialConfig:
    """An argparse type: `1/16/4/1` for ZeRO-1, micro-batch 16, gas 4 and checkpointing of every block."""
    if not re.fullmatch(r"\d+(/\d+){3}", text):
        raise argparse.ArgumentTypeError(f"{text} is not STAGE/MBS/GAS/CKPT, such as 1/16/4/1")
    stage, mbs, gas, ckpt = (int(part) for part in text.split("/"))
    return TrialConfig(
        zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas, activation_checkpointing=ckpt
    )


def between(rows: list[dict[str, Any]], peak_bytes: float) -> tuple[float, float]:
    """The caps it does not run under, and does, in GiB, as far as these runs of a configuration tell."""
    low = [row["cap_gib"] for row in rows if row["oom"]]
    high = [row["cap_gib"] for row in rows if not row["oom"]]
    return max(low, default=FACTORS[0] * peak_bytes / GIB), min(high, default=FACTORS[1] * peak_bytes / GIB)


def lost_shares(path: Path) -> list[float]:
    """Share of its large tensors that each recorded configuration lost to fragments: about the middle of what its runs
    leave open."""
    head, *lines = [json.loads(text) for text in path.read_text().splitlines()]
    machine = Machine(
        device="cuda", name=head["hardware"].partition("x")[2], ranks=head["ranks"],
        memory_bytes=int(head["memory_cap_gib"] * GIB),
    )  # fmt: skip
    model = CostModel(
        HuggingFaceWorkload(**{key: head[key] for key in ("model", "seq_len", "dtype")}), hardware_of(machine)
    )
    found = []
    for _, group in itertools.groupby(lines, key=lambda row: row["name"]):
        rows = list(group)
        if len(rows) < RUNS - 1:
            continue  # cut off
        config = config_from("/".join(str(rows[0][key]) for key in ("stage", "mbs", "gas", "ckpt")))
        memory = model.predict(config).memory
        peak = min((row["peak_gib"] * GIB for row in rows if not row["oom"]), default=memory.peak_bytes)
        middle = sum(between(rows, memory.peak_bytes)) / 2 * GIB
        found.append((middle - peak) / memory.large_bytes)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("configs", type=config_from, nargs="+", metavar="STAGE/MBS/GAS/CKPT")
    parser.add_argument("--model", default="gpt2-medium")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no run after so long")
    arguments = parser.parse_args()
    started = time.monotonic()
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=2, memory_cap_bytes=None)
    defaults = DEFAULTS[machine.device]
    workload = HuggingFaceWorkload(model=arguments.model, seq_len=defaults.seq_len, dtype=defaults.dtype)
    model = CostModel(workload, hardware_of(machine))
    if not arguments.file.exists():
        arguments.file.write_text(json.dumps(header(workload, machine)) + "\n")
    first, *lines = arguments.file.read_text().splitlines()
    if json.loads(first) != header(workload, machine):
        print(f"{arguments.file} was recorded on something else: {first}", file=sys.stderr)
        return 2
    rows = [json.loads(text) for text in lines]
    folder = Path(tempfile.mkdtemp(prefix="least-memory-"))
    launcher = LocalLauncher(machine)
    found = []
    try:
        for config in arguments.configs:
            predicted = model.predict(config).memory.peak_bytes
            of_config = [row for row in rows if row["name"] == config.name]
            while len(of_config) < RUNS and time.monotonic() - started < arguments.seconds:
                cap_gib = sum(between(of_config, predicted)) / 2
                capped = detect_machine(gpus=arguments.gpus, cpu_ranks=2, memory_cap_bytes=int(cap_gib * GIB))
                objective = DeepSpeedObjective(
                    workload, capped, launcher=launcher, log_folder=folder, trial_seconds=120, plan=PLAN
                )
                begun = time.monotonic()
                try:
                    outcome = objective.run(config, folder, lambda phase: None)
                finally:
                    objective.close()
                row = {"name": config.name, "cap_gib": cap_gib, "predicted_gib": predicted / GIB}
                of_config.append(row | line(config, outcome, time.monotonic() - begun))
                with arguments.file.open("a") as file:
                    file.write(json.dumps(of_config[-1]) + "\n")
            low, high = between(of_config, predicted)
            peak = min((row["peak_gib"] for row in of_config if not row["oom"]), default=predicted / GIB)
            found.append([config.name, peak, low - peak, high - peak, low / peak - 1, high / peak - 1])
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        launcher.close()
    print(tabulate(found, ["name", "peak GiB", "lost GiB from", "to", "share from", "to"], floatfmt=".3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
