"""`tune --replay FILE`: a whole study on recorded points, which says everywhere that its figures are replayed."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import optuna_dashboard
import pytest

from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Provenance
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.arguments import tune_parser
from ds_tune.tuner.cli import main
from ds_tune.tuner.request import TRAINING_FIELDS

Line = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]

HEADER = {
    "hardware": "2xH200",
    "ranks": 2,
    "memory_cap_gib": 80,
    "model": "gpt2-xl",
    "seq_len": 1024,
    "dtype": "fp16",
    "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
}
CAPACITY_GIB = HEADER["memory_cap_gib"]


def line(stage: int, mbs: int, gas: int, ckpt: int, **more: Any) -> Line:
    """Larger micro-batches are faster, stages and checkpointing cost speed and save memory."""
    assert isinstance(CAPACITY_GIB, int)
    row: Line = {"stage": stage, "mbs": mbs, "gas": gas, "ckpt": ckpt, "oom": False, "trial_s": 30.0, **more}
    peak_gib = 40 / (1 + stage) + mbs * (1 if ckpt else 4)
    if peak_gib > CAPACITY_GIB:
        return {**row, "oom": True, "failure": "out_of_memory", "phase": "backward", "peak_gib": CAPACITY_GIB - 0.5}
    rate = 60 * mbs / (mbs + 2) * (1 - 0.04 * stage) * (0.8 if ckpt else 1.0)
    step_s = 2 * mbs * gas / rate
    steps_s = [step_s * (1 + ripple) for ripple in (-0.01, 0.005, 0.0, 0.01, -0.005)]
    return {
        **row,
        "step_s": step_s,
        "samples_per_s": rate,
        "peak_gib": peak_gib,
        "reserved_gib": peak_gib,
        "steps_s": steps_s,
    }


GRID = [
    line(stage, mbs, gas, ckpt)
    for stage in range(4)
    for mbs in (1, 2, 3, 8, 16, 32)
    for gas in (1, 4)
    for ckpt in (0, 1)
    if (stage, mbs) != (1, 8)  # a partial grid
]


def write(path: Path, lines: list[Line], **header: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**HEADER, **header}, *lines]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "surface.jsonl", GRID)
    return tmp_path


@pytest.fixture
def tune(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `tune --replay surface.jsonl` unless told; the status, the output and the errors."""

    def run(*arguments: str, replay: str | None = "surface.jsonl") -> tuple[int, str, str]:
        status = main([*(["--replay", replay] if replay else []), *arguments])
        return status, *capsys.readouterr()

    return run


def store(folder: Path, results: str = "autotuning_results") -> StudyStore:
    return StudyStore.load(ResultsFolder(folder / results).storage_url, None)


def test_whole_study_of_recorded_points_is_run_without_training(folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "ds_tune.tuner", "--replay", "surface.jsonl", "--trials", "9", "--seed", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"surface.jsonl: {len(GRID)} recorded configurations "
        f"({sum(row['oom'] for row in GRID)} out of memory); nothing is run."
    )
    assert lines[1] == "gpt2-xl fp16, sequence length 1024, synthetic tokens on 2 × H200 (80.0 GiB), replayed"
    recorded = read_recording(folder / "surface.jsonl").outcomes
    records = store(folder).records()
    assert len({record.config for record in records}) == 9
    for record in records:
        assert record.outcome == recorded[record.config]
    assert records[0].config.name == "z0_gas1_tmbspg1"


def test_every_figure_says_that_it_is_replayed(tune: Run, folder: Path) -> None:
    status, output, _ = tune("--trials", "9")
    assert status == 0
    for text in output.splitlines():
        if re.match(r"#\d|Speed-up|Tuning took|Best |  samples/s|  peak GiB", text):
            assert "replayed" in text, text
    results = ResultsFolder(folder / "autotuning_results")
    report = results.summary_markdown.read_text()
    assert report.startswith("# gpt2-xl, replayed\n\nAll figures are **replayed**: ")
    assert "samples/s, replayed" in report and "peak GiB, replayed" in report
    assert results.summary_text.read_text().endswith("Total number of experiments: 9. All figures are replayed.")
    with results.trials_csv.open(newline="") as file:
        assert {row["figures"] for row in csv.DictReader(file)} == {"replayed"}
    document = json.loads(results.study_json.read_text())
    schema = json.loads((Path(__file__).parents[2] / "tuner" / "reports" / "study.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["figures"] == "replayed"
    assert document["versions"] == HEADER["versions"]
    best = json.loads((results.root / document["best"]["name"] / "metrics.json").read_text())
    assert (best["figures"], best["FLOPS_per_gpu"], best["fwd"]) == ("replayed", None, None)
    comment, command = results.optimal_command.read_text().splitlines()
    assert comment.startswith("# ") and "replayed" in comment
    assert "deepspeed --include localhost:0,1 --module ds_tune.objectives.rank.train --model gpt2-xl" in command


def test_the_dashboard_says_it_too(tune: Run, folder: Path) -> None:
    tune("--trials", "3")
    study = store(folder).study
    assert "All figures are **replayed**" in optuna_dashboard.get_note(study)
    assert study.metric_names == ["samples_per_second, replayed"]
    assert all(trial.user_attrs["figures"] == "replayed" for trial in study.trials)


def test_nothing_is_said_to_be_verified(tune: Run, folder: Path) -> None:
    _, output, _ = tune("--trials", "9")
    assert "verif" not in output.lower()
    for name in ("summary.md", "summary.txt"):
        assert "verif" not in (folder / "autotuning_results" / name).read_text().lower()
    with (folder / "autotuning_results" / "trials.csv").open(newline="") as file:
        assert {row["verified_samples_per_second"] for row in csv.DictReader(file)} == {""}
    summary = store(folder).summary()
    assert (summary.winner, summary.verification, summary.best) == (None, {}, summary.fastest)
    assert tune("--trials", "9", "--no-verify")[0] == 0


def test_a_report_of_a_replayed_study_tells_the_same(tune: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = tune("--trials", "3")
    assert main(["report"]) == 0
    reported = capsys.readouterr().out
    provenance = [text for text in output.splitlines() if text.startswith("#")]
    assert [text for text in reported.splitlines() if text.startswith("#")] == provenance
    assert "Best by ZeRO stage, replayed" in reported


def test_one_seed_gives_one_study_and_a_resumed_one_goes_on(tune: Run, folder: Path) -> None:
    def names(results: str) -> list[str]:
        return [record.config.name for record in store(folder, results).records()]

    tune("--trials", "9", "--seed", "4", "--results", "whole")
    for trials in ("3", "9"):
        assert tune("--trials", trials, "--seed", "4", "--results", "parts")[0] == 0
    assert names("parts") == names("whole")
    tune("--trials", "9", "--seed", "4", "--sampler", "tpe", "--results", "other")
    assert names("other") != names("whole")


def test_a_space_is_searched_to_its_end_without_asking_for_anything_else(tune: Run, folder: Path) -> None:
    write(folder / "few.jsonl", [line(2, mbs, 1, 1) for mbs in (2, 3, 8, 16, 32)])
    assert tune("--trials", "9", "--sampler", "tpe", replay="few.jsonl")[0] == 0
    records = store(folder).records()
    assert records[0].config.name == "z2_ac1_gas1_tmbspg2"
    assert sorted(record.config.micro_batch_size for record in records) == [2, 3, 8, 16, 32]
    assert store(folder).summary().ended == "every configuration of the space has been tried"


def test_the_baseline_falls_back_as_far_as_was_recorded(tune: Run, folder: Path) -> None:
    too_much = {"oom": True, "peak_gib": 79.0}
    lines = [{**row, **too_much} if row["ckpt"] == 0 or row["stage"] == 0 else row for row in GRID]
    write(folder / "tight.jsonl", lines)
    assert tune("--trials", "9", "--sampler", "tpe", replay="tight.jsonl")[0] == 0
    names = [record.config.name for record in store(folder).records()]
    assert names[:4] == [f"z{stage}_gas1_tmbspg1" for stage in range(4)]
    assert names[4:6] == ["z0_ac1_gas1_tmbspg1", "z1_ac1_gas1_tmbspg1"]
    baseline = store(folder).summary().baseline
    assert baseline is not None and baseline.config.name == names[5]


def test_nothing_recorded_fits(tune: Run, folder: Path) -> None:
    write(folder / "tight.jsonl", [{**row, "oom": True, "peak_gib": 79.0} for row in GRID])
    status, output, _ = tune("--trials", "9", replay="tight.jsonl")
    assert status == 3
    assert "Nothing fits: not even the smallest configuration there is fits, in any ZeRO stage." in output


def test_lines_that_are_left_out_are_counted_in_one_line(tune: Run, folder: Path) -> None:
    again = {**line(1, 1, 1, 0), "room": "warm"}
    crash = {"stage": 1, "mbs": 8, "gas": 1, "ckpt": 0, "oom": False, "trial_s": 9.0, "failure": "crash"}
    write(folder / "more.jsonl", [*GRID, again, crash])
    _, output, _ = tune("--trials", "1", replay="more.jsonl")
    assert output.splitlines()[0].endswith(
        "Lines left out: 1 that differ from an earlier line in nothing known here, 1 that crashed."
    )


def test_limits_of_the_batch_sizes_hold(tune: Run, folder: Path) -> None:
    assert tune("--trials", "9", "--global-batch", "64")[0] == 0
    records = store(folder).records()
    assert {record.config.global_batch_size(2) for record in records} == {64}
    status, _, error = tune("--trials", "9", "--global-batch", "10", "--results", "none")
    assert status == 2
    assert error.startswith(f"ds-tune: none of the {len(GRID)} configurations that may be tried keeps to the limits")
    assert not (folder / "none").exists()


def test_every_option_of_the_training_and_the_machine_is_refused(tune: Run, folder: Path) -> None:
    groups = {group.title: group._group_actions for group in tune_parser()._action_groups}
    options = [action for title in ("what is trained", "machine") for action in groups[title]]
    assert {action.dest for action in options} == {*TRAINING_FIELDS, "verify", "replay"}
    before = sorted(folder.rglob("*"))
    for action in options:
        if action.dest not in TRAINING_FIELDS:
            continue
        value = [] if action.nargs == 0 else ["fp16" if action.choices else "0" if action.dest == "gpus" else "1"]
        status, output, error = tune(action.option_strings[0], *value)
        assert (status, output) == (2, "")
        assert error.startswith(f"ds-tune: --replay does not go with {action.option_strings[0]}: the recording says ")
        assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_malformed_line_is_refused_and_nothing_written(tune: Run, folder: Path) -> None:
    write(folder / "wrong.jsonl", [*GRID[:3], {**GRID[3], "trial_s": -1}, *GRID[4:]])
    before = sorted(folder.rglob("*"))
    status, output, error = tune("--trials", "9", replay="wrong.jsonl")
    assert (status, output) == (2, "")
    assert error == (
        "ds-tune: --replay wrong.jsonl, line 5: trial_s is -1, not a number above 0; docs/surfaces.md has the format\n"
    )
    assert sorted(folder.rglob("*")) == before


def test_a_replayed_study_and_another_never_mix(tune: Run, folder: Path) -> None:
    tune("--trials", "2")
    write(folder / "again.jsonl", [{**row, "trial_s": 31.0} for row in GRID])
    status, _, error = tune("--trials", "4", replay="again.jsonl")
    assert status == 2
    assert re.search(r"measured something else \(recording \w+ there, \w+ here\)", error)
    # The very machine and training; what differs is that ranks would be run.
    status, _, error = tune("--trials", "4", "--gpus", "0", replay=None)
    assert status == 2
    assert "(figures replayed there, measured here; " in error
    assert len(store(folder).records()) == 2
    assert store(folder).summary().provenance is Provenance.REPLAYED


def test_a_sampler_of_optunas_own_could_hold_every_parameter(tune: Run, folder: Path) -> None:
    tune("--trials", "9")
    study = store(folder).study
    assert isinstance(
        study.trials[0].distributions["activation_checkpointing"], optuna.distributions.CategoricalDistribution
    )
    assert set(study.trials[0].params) == {
        "zero_stage", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing",
    }  # fmt: skip
