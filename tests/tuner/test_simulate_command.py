"""`tune --hardware GPUS --simulate`: a whole study on a cost model of GPUs that are not here, marked as simulated."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import optuna_dashboard
import pytest

from ds_tune.objectives.loss_scale import STAGE_0_LEFT_OUT
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import Failure, Provenance
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import Source, StudyState, TrialRecord
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.cli import main

Run = Callable[..., tuple[int, str, str]]
LLAMA_8B = str(Path(__file__).parent / "models" / "llama-8b.json")
SEED_MACHINE = "16xV100-32GB"
"""The machine of DeepSpeed's published autotuning results."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def simulate(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `tune --hardware GPUS --simulate`; the status, the output and the errors."""

    def run(*arguments: str, hardware: str = SEED_MACHINE) -> tuple[int, str, str]:
        status = main(["--hardware", hardware, "--simulate", *arguments])
        return status, *capsys.readouterr()

    return run


def store(folder: Path, results: str = "autotuning_results") -> StudyStore:
    return StudyStore.load(ResultsFolder(folder / results).storage_url, None)


def names(folder: Path, results: str = "autotuning_results") -> list[str]:
    return [record.config.name for record in store(folder, results).records()]


def check(document: Any) -> None:
    schema = json.loads(resources.files("ds_tune.tuner.reports").joinpath("study.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)


def test_a_whole_study_runs_in_a_process_that_loads_nothing_that_trains(folder: Path) -> None:
    script = (
        "import sys, ds_tune.tuner.cli\n"
        "status = ds_tune.tuner.cli.main(sys.argv[1:])\n"
        "print(status, *{'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)"
    )
    arguments = ["--hardware", SEED_MACHINE, "--simulate", "--trials", "9"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "0\n")
    lines = done.stdout.splitlines()
    assert lines[0] == "Simulated: a cost model of 16xV100-32GB answers, with errors and noise; nothing is run."
    assert lines[1] == STAGE_0_LEFT_OUT
    assert lines[2] == (
        "gpt2-xl fp16, sequence length 1024, synthetic tokens on 16 × NVIDIA V100-32GB (31.7 GiB), simulated"
    )
    records = store(folder).records()
    assert 2 <= len({record.config for record in records}) == len(records) <= 9
    assert {record.machine.ranks for record in records} == {16}


def test_every_figure_on_the_console_says_that_it_is_simulated(simulate: Run) -> None:
    status, output, error = simulate("--trials", "9")
    assert (status, error) == (0, "")
    provenance = [
        text for text in output.splitlines() if re.match(r"#\d|Speed-up|Tuning took|Best |  samples/s|  peak GiB", text)
    ]
    assert len(provenance) >= 9
    for text in provenance:
        assert "simulated" in text, text


def test_stage_0_is_said_to_be_left_out_in_fp16_only(simulate: Run) -> None:
    assert STAGE_0_LEFT_OUT in simulate("--trials", "1", "--dtype", "fp16", hardware="2xH100")[1]
    assert STAGE_0_LEFT_OUT not in simulate("--trials", "1", "--dtype", "bf16", "--results", "b", hardware="2xH100")[1]


def test_a_space_file_with_stage_0_is_refused_in_fp16_and_nothing_is_written(simulate: Run, folder: Path) -> None:
    (folder / "s.toml").write_text("[search]\nzero_stage = [0, 1]\n")
    status, _, error = simulate("--space", "s.toml", "--trials", "1")
    assert status == 2
    assert "--space s.toml: ZeRO stage 0 is left out: in fp16" in error and "--dtype bf16" in error
    assert [path.name for path in folder.iterdir()] == ["s.toml"]
    assert simulate("--space", "s.toml", "--trials", "1", "--dtype", "bf16", hardware="2xH100")[0] == 0


def test_every_file_says_that_its_figures_are_simulated(simulate: Run, folder: Path) -> None:
    assert simulate("--trials", "9")[0] == 0
    results = ResultsFolder(folder / "autotuning_results")
    report = results.summary_markdown.read_text()
    assert report.startswith("# gpt2-xl, simulated\n\nAll figures are **simulated**: ")
    assert "samples/s, simulated" in report and "peak GiB, simulated" in report
    count = len(store(folder).records())
    closing = f"Total number of experiments: {count}. All figures are simulated."
    assert results.summary_text.read_text().endswith(closing)
    with results.trials_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count and {row["figures"] for row in rows} == {"simulated"}
    document = json.loads(results.study_json.read_text())
    check(document)
    assert document["figures"] == "simulated"
    metrics = json.loads((results.root / document["best"]["name"] / "metrics.json").read_text())
    assert metrics["figures"] == "simulated"
    comment, command = results.optimal_command.read_text().splitlines()
    assert comment.startswith("# The fastest by simulated figures") and "it was not run here" in comment
    assert "--module ds_tune.objectives.rank.train --model gpt2-xl" in command


def test_the_dashboard_says_it_too(simulate: Run, folder: Path) -> None:
    simulate("--trials", "3")
    study = store(folder).study
    assert "All figures are **simulated**" in optuna_dashboard.get_note(study)
    assert study.metric_names == ["samples_per_second, simulated"]
    assert all(trial.user_attrs["figures"] == "simulated" for trial in study.trials)


def test_the_document_is_all_of_the_output(simulate: Run, folder: Path) -> None:
    status, output, error = simulate("--trials", "9", "--json")
    assert status == 0
    document = json.loads(output)
    check(document)
    assert document == json.loads(ResultsFolder(folder / "autotuning_results").study_json.read_text())
    assert (document["figures"], document["state"]) == ("simulated", "finished")
    assert document["hardware"]["description"] == "16 × NVIDIA V100-32GB (31.7 GiB)"
    assert "simulated" in error
    assert simulate("--trials", "9", "--quiet", "--results", "quiet") == (0, "", "")


def test_nothing_is_verified(simulate: Run, folder: Path) -> None:
    _, output, _ = simulate("--trials", "9")
    assert "verif" not in output.lower()
    for name in ("summary.md", "summary.txt"):
        assert "verif" not in (folder / "autotuning_results" / name).read_text().lower()
    with (folder / "autotuning_results" / "trials.csv").open(newline="") as file:
        assert {row["verified_samples_per_second"] for row in csv.DictReader(file)} == {""}
    summary = store(folder).summary()
    assert (summary.winner, summary.verification, summary.best) == (None, {}, summary.fastest)
    assert simulate("--trials", "9", "--no-verify")[0] == 0


def test_one_seed_gives_one_study_and_a_resumed_one_goes_on(simulate: Run, folder: Path) -> None:
    def outcomes(results: str) -> list[tuple[str, object]]:
        return [(record.config.name, record.outcome) for record in store(folder, results).records()]

    simulate("--trials", "6", "--seed", "4", "--results", "whole")
    for trials in ("2", "4", "6"):
        assert simulate("--trials", trials, "--seed", "4", "--results", "parts")[0] == 0
    assert outcomes("parts") == outcomes("whole")
    simulate("--trials", "6", "--seed", "5", "--results", "other")
    assert outcomes("other") != outcomes("whole")


def test_a_finished_study_is_left_as_it_is(simulate: Run, folder: Path) -> None:
    simulate("--trials", "3")
    before = store(folder).records()
    status, output, _ = simulate("--trials", "3")
    assert status == 0
    assert "Study ds-tune is finished (3 trials); --more M adds M trials." in output
    assert store(folder).records() == before
    assert simulate("--more", "1")[0] == 0
    assert store(folder).records()[:3] == before and len(names(folder)) == 4


@pytest.mark.parametrize(
    ("hardware", "description"),
    [
        ("16xV100-32GB", "16 × NVIDIA V100-32GB (31.7 GiB)"),
        ("1xH200", "1 × NVIDIA H200 (139.8 GiB)"),
        ("H100", "1 × NVIDIA H100 (79.1 GiB)"),
        ("8x a100-80gb", "8 × NVIDIA A100-80GB (79.1 GiB)"),
        ("2×RTX 4090", "2 × NVIDIA RTX4090 (23.6 GiB)"),
        ("4xT4", "4 × NVIDIA T4 (14.6 GiB)"),
    ],
)
def test_any_known_gpu_can_be_imagined(simulate: Run, folder: Path, hardware: str, description: str) -> None:
    assert simulate("--trials", "2", "--model", "gpt2", hardware=hardware)[0] == 0
    summary = store(folder).summary()
    assert (summary.machine.description, summary.finished_trials) == (description, 2)
    assert summary.baseline is not None and summary.baseline.config.name == "z1_gas1_tmbspg1"


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_optunas_samplers_can_be_tried_on_it(simulate: Run, folder: Path, sampler: str) -> None:
    assert simulate("--trials", "9", "--sampler", sampler)[0] == 0
    summary = store(folder).summary()
    assert (summary.finished_trials, summary.ended) == (9, None)
    assert all(record.forecast is None for record in summary.records)


def test_simulated_study_keeps_the_model_dtype_sequence_length_and_ds_config(simulate: Run, folder: Path) -> None:
    (folder / "ds.json").write_text(json.dumps({"gradient_clipping": 0.5, "train_batch_size": "auto"}))
    arguments = ["--model", "gpt2-large", "--dtype", "bf16", "--seq-len", "512", "--ds-config", "ds.json"]
    assert simulate("--trials", "4", "--global-batch", "64", *arguments, hardware="8xA100-40GB")[0] == 0
    summary = store(folder).summary()
    assert summary.workload.description == "gpt2-large bf16, sequence length 512, synthetic tokens"
    assert {record.config.global_batch_size(8) for record in summary.records} == {64}
    optimal = json.loads(ResultsFolder(folder / "autotuning_results").optimal_config.read_text())
    assert (optimal["gradient_clipping"], optimal["train_batch_size"]) == (0.5, 64)


def test_a_cap_holds(simulate: Run, folder: Path) -> None:
    assert simulate("--trials", "9", "--memory-cap", "60GiB", hardware="1xH200")[0] == 0
    summary = store(folder).summary()
    assert summary.machine.description == "1 × NVIDIA H200 (139.8 GiB), capped at 60.00 GiB a rank"
    assert all((record.outcome.peak_memory_bytes or 0) <= 60 * GIB for record in summary.records)


def out_of_memory(record: TrialRecord) -> bool:
    return isinstance(record.outcome, Failure) and (record.reason or "").startswith("out of memory in ")


def test_baseline_is_the_smallest_likely_to_fit_where_zero_0_is_unlikely_to(simulate: Run, folder: Path) -> None:
    """35 GiB are more than an RTX 4090's 23.6, but not beyond all doubt before anything was measured."""
    assert simulate("--trials", "5", "--dtype", "bf16", hardware="2xRTX4090")[0] == 0
    summary = store(folder).summary()
    assert summary.baseline is summary.records[0]
    assert (summary.records[0].config.name, summary.records[0].source) == ("z1_gas1_tmbspg1", Source.BASELINE)
    assert not any(out_of_memory(record) for record in summary.records)


def test_baseline_is_the_smallest_that_fits_after_zero_0_ran_out_of_memory(simulate: Run, folder: Path) -> None:
    """35 GiB fit into 41 unless much is lost to fragments."""
    cap = ["--dtype", "bf16", "--memory-cap", "41GiB"]
    assert simulate("--trials", "5", "--seed", "9", *cap, hardware="2xH200")[0] == 0
    summary = store(folder).summary()
    first, second = summary.records[:2]
    assert out_of_memory(first) and (first.config.name, first.source) == ("z0_gas1_tmbspg1", Source.BASELINE)
    assert summary.baseline is second and second.config.name == "z1_gas1_tmbspg1"
    report = ResultsFolder(folder / "autotuning_results").summary_markdown.read_text()
    assert re.search(r"\| baseline +\| z1_gas1_tmbspg1 +\|", report)


def test_names_and_states_stay_apart_however_long_a_name_is(
    simulate: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    code, said, _ = simulate("--trials", "7", "--preset", "speed", "--memory-cap", "32GiB", hardware="1xH100")
    assert code == 0
    lines = [line.split() for line in said.splitlines() if re.match(r"#\d", line)]
    names = [record.config.name for record in store(folder).summary().records]
    assert [words[1] for words in lines] == names
    assert max(map(len, names)) > 40


def test_zero_0_certain_not_to_fit_is_not_launched_as_the_baseline(simulate: Run, folder: Path) -> None:
    assert simulate("--trials", "5", "--dtype", "bf16", hardware="16xL4")[0] == 0
    summary = store(folder).summary()
    assert summary.baseline is summary.records[0]
    assert (summary.records[0].config.name, summary.records[0].source) == ("z1_gas1_tmbspg1", Source.BASELINE)
    assert all(record.config.zero_stage > 0 for record in summary.records)
    assert not (folder / "autotuning_results" / "z0_gas1_tmbspg1").exists()
    assert "z0_gas1_tmbspg1" in [each.name for each in summary.excluded]
    assert summary.speedup is not None and summary.speedup.factor >= 1


@pytest.mark.parametrize(
    ("hardware", "launched"),
    [
        # One trial has to say that it is far too large, and it is that of the last resort.
        ("1xT4", ["z3_gas1_tmbspg1"]),
    ],
)
def test_nothing_fits(simulate: Run, folder: Path, hardware: str, launched: list[str]) -> None:
    words = ["--trials", "9", "--model", LLAMA_8B, "--seq-len", "2048"]
    status, output, _ = simulate(*words, hardware=hardware)
    assert status == 3
    hint = "; with all that saves memory it would take 2 such GPUs."
    said = "Nothing fits: not even one sample a rank fits, in any ZeRO stage" + hint
    assert output.splitlines()[-1] == said
    summary = store(folder).summary()
    assert summary.state is StudyState.NOTHING_FITS
    assert [record.config.name for record in summary.records] == launched
    assert all(out_of_memory(record) for record in summary.records)
    assert simulate(*words, hardware=hardware)[0] == 3
    assert names(folder) == launched
    results = ResultsFolder(folder / "autotuning_results")
    check(json.loads(results.study_json.read_text()))
    assert not results.optimal_config.exists()


def test_a_simulated_study_is_not_gone_on_with_by_measuring(
    simulate: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate("--trials", "2")
    before = store(folder).records()
    assert main(["--gpus", "0", "--trials", "4"]) == 2
    error = capsys.readouterr().err
    assert "study ds-tune measured something else (" in error
    assert "figures simulated there, measured here" in error
    assert store(folder).records() == before


def test_a_measured_study_is_not_gone_on_with_by_simulating(
    simulate: Run, tune: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    assert tune("--trials", "2").returncode == 0
    before = store(folder).records()
    status, _, error = simulate("--trials", "4")
    assert status == 2
    assert "figures measured there, simulated here" in error
    summary = store(folder).summary()
    assert (summary.records, summary.provenance) == (before, Provenance.MEASURED)
    # Under a name of its own it still needs a folder of its own.
    status, _, error = simulate("--trials", "4", "--study", "imagined")
    assert status == 2
    assert "autotuning_results holds the results of study ds-tune; give this one a folder of its own" in error


def test_other_imagined_hardware_is_another_study(simulate: Run, folder: Path) -> None:
    simulate("--trials", "2", "--model", "gpt2", hardware="2xH100")
    status, _, error = simulate("--trials", "4", "--model", "gpt2", hardware="2xH200")
    assert status == 2
    assert "hardware name NVIDIA H100 there, NVIDIA H200 here" in error
    assert len(names(folder)) == 2


def test_another_seed_is_another_machine(simulate: Run, folder: Path) -> None:
    """Its deviations from the formulas are drawn from the seed: figures of two seeds cannot be compared."""
    simulate("--trials", "2", "--model", "gpt2", "--seed", "1", hardware="2xH100")
    status, _, error = simulate("--trials", "4", "--model", "gpt2", "--seed", "2", hardware="2xH100")
    assert status == 2
    assert "recording simulated machine 1 there, simulated machine 2 here" in error
    assert len(names(folder)) == 2
