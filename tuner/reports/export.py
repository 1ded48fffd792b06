"""StudySummary -> the files of a results folder, in the layout that DeepSpeed's autotuner writes.

Deliberate differences, all documented in docs/results.md: the throughput is end to end; the optimum has no
`autotuning` block; its command runs as it stands; configurations are files, not base64 in an argument.
"""

import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.metric import DEFAULT_METRIC, METRICS
from ds_tune.objectives.running.local_launcher import threads_per_rank
from ds_tune.objectives.trial import CORE_FIELDS, KNOBS, Measurement, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import TRAINING_MODULE
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.objectives.workload.script import WITH_KNOBS
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.arguments import in_options
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.markdown import closing_line, stage_table, summary_markdown
from ds_tune.tuner.reports.metrics import metric_values
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.reports.verdict import standing_words

MICROSECONDS = 1e6

CSV_COLUMNS = (
    "number", "name", "state", "source", *CORE_FIELDS, "global_batch_size",
    "samples_per_second", "samples_per_second_ci95_low", "samples_per_second_ci95_high",
    "verified_samples_per_second", "verified_samples_per_second_ci95_low", "verified_samples_per_second_ci95_high",
    *(name for name in METRICS if name != DEFAULT_METRIC),
    "step_seconds", "peak_memory_bytes", "reserved_memory_bytes", "setup_seconds", "wall_seconds",
    "figures", "standing", "reason",
)  # fmt: skip


def training_command(workload: Workload, machine: Machine, ds_config: Path, config: TrialConfig) -> list[str]:
    """The argv that trains with a configuration through DeepSpeed's own launcher, from any folder.

    Args:
        ds_config: what of the configuration DeepSpeed's file says; the knobs of the model are options.
    """
    command = local_launcher(machine)
    return workload.launch_line(command, machine.ranks, ds_config.resolve(), config)


def local_launcher(machine: Machine) -> list[str]:
    """DeepSpeed's launcher, with the options that have it use the ranks of a machine.

    It reads `--include` as the machine's own numbers, whatever CUDA_VISIBLE_DEVICES says, and knows no UUIDs: torchrun
    leaves that variable to its ranks.
    """
    if machine.device == "cpu":
        return ["deepspeed", "--num_gpus", str(machine.ranks)]
    devices = machine.visible_devices or tuple(map(str, machine.device_ids))
    if all(name.isdigit() for name in devices):
        return ["deepspeed", "--include", f"localhost:{','.join(devices)}"]
    return ["torchrun", "--standalone", "--nproc_per_node", str(machine.ranks)]


def launch_line(summary: StudySummary, folder: ResultsFolder) -> str | None:
    """The line that trains with a study's winner, for a person to copy; None where nothing was run or written."""
    if summary.best is None or summary.provenance is not Provenance.MEASURED or not folder.optimal_config.exists():
        return None
    machine, config = summary.best.machine, summary.best.config
    return shlex.join(training_command(summary.workload, machine, folder.optimal_config, config))


def shell_line(command: Sequence[str], machine: Machine) -> str:
    """The command as a line for a shell, with the environment that it needs there.

    The PATH leads to this installation's deepspeed, and to the ninja that torch compiles DeepSpeed's ops with. Of
    ds-tune's own training nothing lies in the folder where it is run, so that no file there may shadow a package.
    """
    settings = "PYTHONSAFEPATH=1 " if any(module in command for module in (TRAINING_MODULE, WITH_KNOBS)) else ""
    settings += f'PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH"'
    if machine.visible_devices and "--include" not in command:
        settings += f" CUDA_VISIBLE_DEVICES={shlex.quote(','.join(machine.visible_devices))}"
    if machine.device == "cpu":
        settings += f" DS_ACCELERATOR=cpu LOCAL_SIZE={machine.ranks} OMP_NUM_THREADS={threads_per_rank(machine)}"
    return f"{settings} {shlex.join(command)}\n"


def write_trial_inputs(folder: Path, config: TrialConfig, workload: Workload, machine: Machine) -> None:
    """Writes what a trial is started from: ds_config.json, exp.json and cmd.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    ds_config_path = folder / "ds_config.json"
    ds_config = deepspeed_config(config, workload, ranks=machine.ranks, device=machine.device)
    command = training_command(workload, machine, ds_config_path, config)
    experiment = {
        "name": config.name,
        "ds_config": ds_config,
        "num_gpus": machine.ranks,
        "num_nodes": 1,
        "hostfile": None,
        "result_dir": str(folder),
        "launcher_args": command[1 : len(local_launcher(machine))],
        "ds_config_path": str(ds_config_path),
    }
    write_atomically(ds_config_path, json.dumps(ds_config))
    write_atomically(folder / "exp.json", json.dumps(experiment))
    write_atomically(folder / "cmd.txt", shell_line(command, machine))


def metrics_document(
    record: TrialRecord, measured: Measurement, provenance: Provenance = Provenance.MEASURED
) -> dict[str, Any]:
    """DeepSpeed's metrics.json: times in microseconds a step; `throughput` is end to end.

    `latency` is the whole step, not the sum of the three; ds-tune's own figures stand beside DeepSpeed's keys.
    What a recording does not say is null.
    """
    step_seconds = sum(measured.step_seconds) / len(measured.step_seconds)
    per_rank = measured.samples_per_second / record.machine.ranks
    low, high = measured.samples_per_second_ci95
    return {
        "fwd": measured.forward_seconds * MICROSECONDS or None,
        "bwd": measured.backward_seconds * MICROSECONDS or None,
        "step": measured.optimizer_seconds * MICROSECONDS or None,
        "latency": step_seconds * MICROSECONDS,
        "FLOPS_per_gpu": measured.flops_per_sample * per_rank or None,
        "throughput": measured.samples_per_second,
        "rank": 0,
        "throughput_ci95": [low, high],
        "deepspeed_throughput": measured.deepspeed_samples_per_second,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "step_seconds": list(measured.step_seconds),
        "figures": provenance.value,
    }


def summary_text(report: Report) -> str:
    """The table that DeepSpeed's autotuner writes to summary.txt, and its closing line, with no newline after it."""
    return f"{stage_table(report)}\n\n{closing_line(report.summary)}"


def trials_csv(summary: StudySummary) -> str:
    """One line a trial, with the raw units: bytes and seconds."""
    text = io.StringIO()
    knobs = [field for field in KNOBS if any(field in record.config.knobs_on for record in summary.records)]
    after = CSV_COLUMNS.index("global_batch_size")
    columns = [*CSV_COLUMNS[:after], *knobs, *CSV_COLUMNS[after:]]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for record in summary.records:
        row: dict[str, Any] = {
            "number": record.number,
            "name": record.config.name,
            "state": record.state.value,
            "source": record.source.value,
            **{field: getattr(record.config, field) for field in (*CORE_FIELDS, *knobs)},
            "global_batch_size": record.config.global_batch_size(record.machine.ranks),
            "peak_memory_bytes": record.outcome.peak_memory_bytes,
            "wall_seconds": record.outcome.wall_seconds,
            "figures": summary.provenance.value,
            "standing": standing_words(record, summary).removeprefix("★ "),
            "reason": record.reason or "",
        }
        if (verified := summary.verified(record)) is not None:
            low, high = verified.samples_per_second_ci95
            row |= {
                "verified_samples_per_second": verified.samples_per_second,
                "verified_samples_per_second_ci95_low": low,
                "verified_samples_per_second_ci95_high": high,
            }
        if isinstance(record.outcome, Measurement):
            measured = record.outcome
            row |= {
                **{name: "" if value is None else value for name, value in metric_values(measured, summary).items()},
                "samples_per_second_ci95_low": measured.samples_per_second_ci95[0],
                "samples_per_second_ci95_high": measured.samples_per_second_ci95[1],
                "step_seconds": sum(measured.step_seconds) / len(measured.step_seconds),
                "reserved_memory_bytes": measured.reserved_memory_bytes,
                "setup_seconds": measured.setup_seconds,
            }
        writer.writerow(row)
    return text.getvalue()


def export(report: Report, folder: ResultsFolder) -> list[Path]:
    """Writes everything that can be made from a study's records.

    Returns:
        The files a person will want to open, the best first.
    """
    summary = report.summary
    folder.root.mkdir(parents=True, exist_ok=True)
    for record in summary.records:
        trial_folder = folder.trial(record.config)
        write_trial_inputs(trial_folder, record.config, summary.workload, record.machine)
        if isinstance(record.outcome, Measurement):
            write_json(trial_folder / "metrics.json", metrics_document(record, record.outcome, summary.provenance))
        else:
            (trial_folder / "metrics.json").unlink(missing_ok=True)
        for log, text in (("stdout.log", ""), ("stderr.log", getattr(record.outcome, "log_tail", ""))):
            # An export into a new folder has no logs to copy: what the record kept of them is better than none.
            if not (trial_folder / log).exists():
                write_atomically(trial_folder / log, text)
    write_atomically(folder.summary_text, summary_text(report))
    write_atomically(folder.summary_markdown, in_options(summary_markdown(report)))
    write_atomically(folder.trials_csv, in_options(trials_csv(summary)))
    write_atomically(folder.study_json, in_options(as_json(study_document(report))))
    written = [folder.summary_markdown, folder.summary_text, folder.trials_csv, folder.study_json]
    best = summary.best
    if best is None:
        for path in (folder.optimal_config, folder.optimal_command):
            path.unlink(missing_ok=True)
        return written
    optimal = deepspeed_config(
        best.config, summary.workload, ranks=best.machine.ranks, device=best.machine.device, exported=True
    )
    write_json(folder.optimal_config, optimal)
    extra = summary.workload.extra_files(best.config)
    for name, text in extra.items():
        write_atomically(folder.root / name, text)
    command = training_command(summary.workload, best.machine, folder.optimal_config, best.config)
    by_hand = summary.workload.by_hand(best.config)
    comments = "".join(f"# {line}\n" for line in (*by_hand, *summary.workload.in_code(best.config)))
    if by_hand:
        first = shlex.quote(f"First: {' '.join(by_hand)} Then remove this line.")
        comments += f"echo {first} >&2; exit 1\n"
    write_atomically(folder.optimal_command, _origin(summary) + comments + shell_line(command, best.machine))
    return [folder.optimal_config, folder.optimal_command, *(folder.root / name for name in extra), *written]


def _origin(summary: StudySummary) -> str:
    """A comment for a shell: the command below it looks like one that has been run."""
    if summary.provenance is Provenance.MEASURED:
        return ""
    return (
        f"# The fastest by {summary.provenance.value} figures of {summary.machine.description}; it was not run here.\n"
    )


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_atomically(path, as_json(document))


def as_json(document: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(document, indent=2) + "\n"
