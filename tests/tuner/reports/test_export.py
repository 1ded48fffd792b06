"""The exported files beside those that DeepSpeed's own autotuner wrote (`deepspeed_sample`, GPT2-xl on 2 × H200)."""

import csv
import dataclasses
import json
import re
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.metric import METRICS
from ds_tune.objectives.trial import Measurement, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.reports.export import (
    export,
    metrics_document,
    shell_line,
    summary_text,
    training_command,
    write_trial_inputs,
)
from ds_tune.tuner.reports.report import Report

SAMPLE = Path(__file__).parent / "deepspeed_sample"
SAMPLE_TRIAL = SAMPLE / "z0_gas1_tmbspg22"
PLAIN = TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=2)
# Left out on purpose: what only DeepSpeed's own scheduler needs, and the configuration in base64.
SCHEDULER_KEYS = {"exp_id", "master_port", "user", "job_id", "ds_config_base64"}


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "results")


@pytest.fixture
def exported(finished: StudySummary, folder: ResultsFolder) -> ResultsFolder:
    export(Report.of(finished), folder)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def column_kinds(summary: str) -> tuple[list[str], list[str], list[list[str]]]:
    """The header, the alignment of each column, and for each row what kind of value each cell holds."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary.splitlines() if "|" in line]
    header, alignment, *rows = table
    kinds = {"integer": r"\d+", "number": r"\d+\.\d+", "experiment": r"z\d_gas\d+_tmbspg\d+", "space": r"z\d|global"}
    return (
        header,
        [re.sub("-+", "-", cell) for cell in alignment],
        [[next(kind for kind, form in kinds.items() if re.fullmatch(form, cell)) for cell in row] for row in rows],
    )


def test_summary_has_deepspeeds_columns(make_record: Callable[..., TrialRecord], make_summary: Any) -> None:
    summary = make_summary([make_record("z0_gas1_tmbspg1", 27.4), make_record("z0_gas2_tmbspg12", 55.4601)])
    ours, deepspeeds = summary_text(Report.of(summary)), (SAMPLE / "summary.txt").read_text()
    assert column_kinds(ours) == column_kinds(deepspeeds)
    # The widths too, as the names are of the same length.
    assert [len(line) for line in ours.splitlines()[:4]] == [len(line) for line in deepspeeds.splitlines()[:4]]


def test_summary_ends_with_deepspeeds_sentence(finished: StudySummary) -> None:
    sentence = r"Tuning completed in \d+:\d\d:\d\d\.\d{6}\. Total number of experiments: \d+\."
    for text in (summary_text(Report.of(finished)), (SAMPLE / "summary.txt").read_text()):
        *table, blank, last = text.splitlines()
        assert all(line.startswith("|") for line in table)
        assert blank == ""
        assert re.fullmatch(sentence, last)
        assert text.endswith(last)


def test_summary_gives_each_stage_and_then_all(finished: StudySummary) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in summary_text(Report.of(finished)).splitlines()[2:7]
    ]
    assert rows == [
        ["z0", "1", "27.5", "z0_gas1_tmbspg1"],
        ["z1", "2", "58.25", "z1_gas2_tmbspg8"],
        ["z2", "1", "", ""],
        ["z3", "1", "", ""],
        ["global", "5", "58.25", "z1_gas2_tmbspg8"],
    ]


def test_a_trials_folder_has_deepspeeds_name_and_files(exported: ResultsFolder, finished: StudySummary) -> None:
    trial = exported.root / "z1_gas2_tmbspg8"
    # stdout.log is in DeepSpeed's layout too; the sample was kept without it.
    assert {path.name for path in trial.iterdir()} == {path.name for path in SAMPLE_TRIAL.iterdir()} | {"stdout.log"}
    for record in finished.records:
        assert re.fullmatch(r"z\d_gas\d+_tmbspg\d+", record.config.name)
        assert (exported.root / record.config.name).is_dir()


def test_a_failed_trial_has_no_metrics_but_its_log(exported: ResultsFolder) -> None:
    trial = exported.root / "z3_gas1_tmbspg64"
    assert not (trial / "metrics.json").exists()
    assert "the last lines of the log" in (trial / "stderr.log").read_text()


def test_exp_json_has_deepspeeds_keys(exported: ResultsFolder) -> None:
    ours, deepspeeds = read(exported.root / "z1_gas2_tmbspg8" / "exp.json"), read(SAMPLE_TRIAL / "exp.json")
    assert set(ours) == set(deepspeeds) - SCHEDULER_KEYS
    assert {key: type(value) for key, value in ours.items() if key != "hostfile"} == {
        key: type(value) for key, value in deepspeeds.items() if key in ours and key != "hostfile"
    }
    assert (ours["name"], ours["num_gpus"], ours["num_nodes"]) == ("z1_gas2_tmbspg8", 2, 1)
    assert Path(ours["ds_config_path"]).name == "ds_config.json"
    assert ours["launcher_args"] == ["--include", "localhost:0,1"]


def test_metrics_have_deepspeeds_keys_and_microseconds(exported: ResultsFolder, finished: StudySummary) -> None:
    ours, deepspeeds = read(exported.root / "z1_gas2_tmbspg8" / "metrics.json"), read(SAMPLE_TRIAL / "metrics.json")
    assert list(ours)[: len(deepspeeds)] == list(deepspeeds)
    for key, value in deepspeeds.items():
        assert type(ours[key]) is type(value), key
    # A step of DeepSpeed's takes 44 samples / 58.5 samples/s = 0.75 s, which it writes as 752306.
    assert deepspeeds["latency"] == pytest.approx(44 / deepspeeds["throughput"] * 1e6, rel=0.01)
    assert ours["latency"] == pytest.approx(32 / 58.25 * 1e6)
    assert ours["throughput"] == pytest.approx(58.25)
    measured = finished.records[1].outcome
    assert isinstance(measured, Measurement)
    assert ours["fwd"] == measured.forward_seconds * 1e6
    assert ours["step"] == measured.optimizer_seconds * 1e6
    # All of the step counts, not only what DeepSpeed's three timers see of it.
    assert ours["fwd"] + ours["bwd"] + ours["step"] < ours["latency"]


def test_flops_are_those_of_one_gpu(finished: StudySummary) -> None:
    record = finished.records[1]
    assert isinstance(record.outcome, Measurement)
    document = metrics_document(record, record.outcome)
    assert document["FLOPS_per_gpu"] == pytest.approx(58.25 * 1.0e13 / 2)


def test_the_optimum_is_a_configuration_without_autotuning(exported: ResultsFolder) -> None:
    ours, deepspeeds = read(exported.optimal_config), read(SAMPLE / "ds_config_optimal.json")
    assert set(ours) == set(deepspeeds)
    assert "autotuning" not in ours
    assert ours["zero_optimization"] == {"stage": 1}
    assert ours["train_micro_batch_size_per_gpu"] == 8
    assert ours["gradient_accumulation_steps"] == 2
    assert ours["train_batch_size"] == 32
    assert ours == read(exported.root / "z1_gas2_tmbspg8" / "ds_config.json")


def test_commands_start_deepspeed_with_a_file(exported: ResultsFolder) -> None:
    deepspeeds = shlex.split((SAMPLE_TRIAL / "cmd.txt").read_text())
    for path, ds_config in (
        (exported.root / "z1_gas2_tmbspg8" / "cmd.txt", exported.root / "z1_gas2_tmbspg8" / "ds_config.json"),
        (exported.optimal_command, exported.optimal_config),
    ):
        words = shlex.split(path.read_text())
        ours = words[words.index("deepspeed") :]
        assert ours[:1] == deepspeeds[:1]
        assert ours[ours.index("--include") + 1] == deepspeeds[deepspeeds.index("--include") + 1] == "localhost:0,1"
        assert ours[-3:-1] == deepspeeds[-3:-1] == ["--deepspeed", "--deepspeed_config"]
        assert Path(ours[-1]).is_absolute() and Path(ours[-1]) == ds_config.resolve()


def test_a_command_names_all_of_the_workload(machine: Machine) -> None:
    workload = HuggingFaceWorkload(
        model="m", seq_len=64, dtype="bf16", dataset="d.txt", text_column="c", packing=False, tokenizer="t",
        pretrained=True,
    )  # fmt: skip
    command = training_command(workload, machine, Path("ds.json"), PLAIN)
    options = ["--model", "m", "--seq-len", "64", "--dataset", "d.txt", "--text-column", "c", "--no-packing"]
    options += ["--tokenizer", "t", "--pretrained"]
    assert command[command.index("--model") : command.index("--deepspeed")] == options


def test_a_command_names_the_activation_checkpointing_that_is_on(
    workload: HuggingFaceWorkload, machine: Machine
) -> None:
    command = training_command(
        workload, machine, Path("ds.json"), dataclasses.replace(PLAIN, activation_checkpointing=2)
    )
    assert command[command.index("--knob") + 1] == "activation_checkpointing=2"
    assert command[-3:] == ["--deepspeed", "--deepspeed_config", str(Path("ds.json").resolve())]
    assert "--knob" not in training_command(workload, machine, Path("ds.json"), PLAIN)


def test_a_command_for_the_cpu_names_the_number_of_ranks(workload: HuggingFaceWorkload) -> None:
    machine = Machine(device="cpu", name="CPU", ranks=4, memory_bytes=GIB)
    assert training_command(workload, machine, Path("ds.json"), PLAIN)[:3] == ["deepspeed", "--num_gpus", "4"]


def test_only_a_command_of_our_own_training_leaves_the_current_folder_out(
    exported: ResultsFolder, machine: Machine
) -> None:
    for path in (exported.optimal_command, exported.root / "z1_gas2_tmbspg8" / "cmd.txt"):
        assert path.read_text().startswith("PYTHONSAFEPATH=1 PATH=")
    assert shell_line(["deepspeed", "mine.py"], machine).startswith("PATH=")  # which may import what lies beside it


@pytest.mark.parametrize("provenance", [Provenance.SIMULATED, Provenance.REPLAYED])
def test_figures_that_were_not_measured_carry_the_word_in_every_file(
    finished: StudySummary, folder: ResultsFolder, provenance: Provenance
) -> None:
    export(Report.of(dataclasses.replace(finished, provenance=provenance)), folder)
    for name in ("summary.md", "summary.txt", "trials.csv", "summary.json", "z1_gas2_tmbspg8/metrics.json"):
        assert provenance.value in (folder.root / name).read_text(), name
    *table, _, last = folder.summary_text.read_text().splitlines()
    assert table == summary_text(Report.of(finished)).splitlines()[:-2]
    assert last.endswith(f" Total number of experiments: 5. All figures are {provenance.value}.")
    # The command still runs as it stands.
    comment, command = folder.optimal_command.read_text().splitlines()
    assert comment.startswith(f"# The fastest by {provenance.value} figures of 2 × NVIDIA H200")
    assert command in shell_line(shlex.split(command.partition('"$PATH" ')[2]), finished.machine)


def test_exported_metrics_are_null_for_forward_time_and_flops_not_recorded(finished: StudySummary) -> None:
    record = finished.records[1]
    assert isinstance(record.outcome, Measurement)
    bare = dataclasses.replace(record.outcome, forward_seconds=0.0, flops_per_sample=0.0)
    document = metrics_document(record, bare, Provenance.REPLAYED)
    assert (document["fwd"], document["FLOPS_per_gpu"]) == (None, None)


def test_trials_csv_has_a_line_a_trial_in_bytes_and_seconds(exported: ResultsFolder, finished: StudySummary) -> None:
    with exported.trials_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "number", "name", "state", "source", "zero_stage", "micro_batch_size", "gradient_accumulation_steps",
        "global_batch_size", "samples_per_second", "samples_per_second_ci95_low",
        "samples_per_second_ci95_high", "verified_samples_per_second", "verified_samples_per_second_ci95_low",
        "verified_samples_per_second_ci95_high", *(name for name in METRICS if name != "samples_per_second"),
        "step_seconds", "peak_memory_bytes", "reserved_memory_bytes", "setup_seconds", "wall_seconds",
        "figures", "standing", "reason",
    ]  # fmt: skip
    assert [row["name"] for row in rows] == [record.config.name for record in finished.records]
    assert [row["state"] for row in rows] == ["complete", "complete", "complete", "pruned", "failed"]
    best, pruned = rows[1], rows[3]
    assert float(best["samples_per_second_ci95_low"]) < 58.25 < float(best["samples_per_second_ci95_high"])
    assert float(best["step_seconds"]) == pytest.approx(32 / 58.25)
    assert {row["figures"] for row in rows} == {"measured"}
    assert int(best["peak_memory_bytes"]) == 20.5 * GIB
    assert [row["standing"] for row in rows] == ["", "fastest of the search", "", "", ""]
    assert best["reason"] == pruned["samples_per_second"] == ""
    assert pruned["reason"] == "out of memory in forward (peak 24.00 of 24.00 GiB)"


def all_files(folder: ResultsFolder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.root)): path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


def test_exporting_twice_gives_the_same_bytes(exported: ResultsFolder, finished: StudySummary) -> None:
    before = all_files(exported)
    export(Report.of(finished), exported)
    assert all_files(exported) == before


def test_an_export_keeps_the_logs_of_the_run(exported: ResultsFolder, finished: StudySummary) -> None:
    log = exported.root / "z3_gas1_tmbspg64" / "stderr.log"
    log.write_text("all of the log\n")
    export(Report.of(finished), exported)
    assert log.read_text() == "all of the log\n"


def test_the_files_to_open_are_named_best_first(finished: StudySummary, folder: ResultsFolder) -> None:
    names = [path.name for path in export(Report.of(finished), folder)]
    assert names[:3] == ["ds_config_optimal.json", "cmd_optimal.txt", "summary.md"]
    assert {"summary.txt", "trials.csv", "summary.json"} == set(names[3:])
    assert all((folder.root / name).is_file() for name in names)


def test_an_empty_study_exports(empty: StudySummary, folder: ResultsFolder) -> None:
    export(Report.of(empty), folder)
    assert "| global" in folder.summary_text.read_text()
    assert folder.trials_csv.read_text().count("\n") == 1
    assert read(folder.study_json)["trials"] == []
    assert not folder.optimal_config.exists()


def test_a_study_where_nothing_fits_exports_without_an_optimum(
    nothing_fits: StudySummary, folder: ResultsFolder
) -> None:
    export(Report.of(nothing_fits), folder)
    assert "not runnable" in folder.summary_markdown.read_text()
    assert read(folder.study_json)["state"] == "nothing_fits"
    assert not folder.optimal_config.exists() and not folder.optimal_command.exists()


def test_an_optimum_of_another_study_does_not_stay(exported: ResultsFolder, nothing_fits: StudySummary) -> None:
    export(Report.of(nothing_fits), exported)
    assert not exported.optimal_config.exists() and not exported.optimal_command.exists()


def test_a_study_without_a_baseline_exports(
    make_record: Callable[..., TrialRecord], make_summary: Callable[..., StudySummary], folder: ResultsFolder
) -> None:
    export(Report.of(make_summary([make_record("z1_gas1_tmbspg1", 10.0)])), folder)
    assert read(folder.study_json)["speedup"] is None
    assert read(folder.optimal_config)["zero_optimization"]["stage"] == 1


DRIFTED = (0.39, 0.5, 0.98, 0.61)
"""Step times of a run on a loaded machine, whose stored interval of 55.8 to 14,815 samples/s once ended a study."""


@pytest.mark.parametrize("interval", [(55.8, 14815.0), (0.0, 1e300), (97.0, 97.0)], ids=str)
def test_every_file_is_written_whatever_interval_a_run_was_stored_with(
    finished: StudySummary, tmp_path: Path, interval: tuple[float, float]
) -> None:
    records = [
        dataclasses.replace(
            record,
            outcome=dataclasses.replace(record.outcome, step_seconds=DRIFTED, samples_per_second_ci95=interval),
        )
        if isinstance(record.outcome, Measurement)
        else record
        for record in finished.records
    ]
    runs = {record.config.name: [record.outcome] * 2 for record in records if isinstance(record.outcome, Measurement)}
    noisy = dataclasses.replace(finished, records=records, verification=runs, winner=records[1].config.name)
    export(Report.of(noisy), ResultsFolder(tmp_path))
    text = (tmp_path / "summary.md").read_text()
    assert "e+" not in text
    assert "Something else used the machine: steps of one configuration differ by" in text
    speedup = json.loads((tmp_path / "summary.json").read_text())["speedup"]
    assert 0 < speedup["ci95"][0] <= speedup["factor"] <= speedup["ci95"][1] < 100


@pytest.mark.slow
def test_a_command_trains_in_a_folder_whose_files_are_named_as_packages(tmp_path: Path) -> None:
    for name in ("deepspeed.py", "torch.py", "transformers.py"):
        (tmp_path / name).write_text("raise SystemExit('the file in the folder was imported')")
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=16, dtype="fp32")
    cpu = Machine(device="cpu", name="CPU", ranks=1, memory_bytes=GIB)
    write_trial_inputs(tmp_path / "trial", PLAIN, workload, cpu)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = (tmp_path / "trial" / "cmd.txt").read_text().replace(" --num_gpus", f" --master_port {port} --num_gpus")
    steps = " --warmup-steps 1 --steps 1 --json done.json"
    done = subprocess.run(["sh", "-c", line.strip() + steps], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(tmp_path / "done.json")["steps"] == 1


@pytest.mark.parametrize(
    ("visible", "launcher"),
    [
        ((), "deepspeed --include localhost:0,1 "),
        (("2", "3"), "deepspeed --include localhost:2,3 "),
        (("GPU-aa", "GPU-bb"), "CUDA_VISIBLE_DEVICES=GPU-aa,GPU-bb torchrun --standalone --nproc_per_node 2 --module "),
    ],
)
def test_a_command_names_the_gpus_that_the_trials_had(
    machine: Machine, workload: HuggingFaceWorkload, visible: tuple[str, ...], launcher: str
) -> None:
    there = dataclasses.replace(machine, visible_devices=visible)
    line = shell_line(training_command(workload, there, Path("ds.json"), PLAIN), there)
    assert f" {launcher}" in line
    assert ("CUDA_VISIBLE_DEVICES" in line) == ("torchrun" in launcher)


def test_a_launcher_of_ones_own_is_given_the_gpus_by_their_variable(machine: Machine) -> None:
    there = dataclasses.replace(machine, visible_devices=("2", "3"))
    assert " CUDA_VISIBLE_DEVICES=2,3 torchrun train.py" in shell_line(["torchrun", "train.py"], there)
