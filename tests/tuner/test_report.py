"""`report` and `export` tell a study again from its storage alone, for people and for programs."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

Tune = Callable[..., subprocess.CompletedProcess[str]]
ESCAPE = "\x1b["


def study_of(output: str) -> dict[str, Any]:
    """The document that is all of the output, checked against the schema."""
    document: dict[str, Any] = json.loads(output)
    schema = json.loads(resources.files("ds_tune.tuner.reports").joinpath("study.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    return document


def closing_tables(output: str) -> str:
    return output[output.index("Best by ZeRO stage") : output.index("Tuning took")]


def trial_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"#\d+ ", line)]


def test_the_study_is_told_again_without_the_results_folder(tune: Tune, command: Tune, tmp_path: Path) -> None:
    first = tune("--trials", "3", "--storage", "sqlite:///study.db")
    assert first.returncode == 0
    results = tmp_path / "autotuning_results"
    document = json.loads((results / "summary.json").read_text())
    files = {path.relative_to(results): path.read_text() for path in results.rglob("*") if path.is_file()}
    shutil.rmtree(results)

    report = command("report", "--storage", "sqlite:///study.db")
    assert report.returncode == 0
    assert trial_lines(report.stdout) == trial_lines(first.stdout)
    assert closing_tables(report.stdout) == closing_tables(first.stdout)
    asked = command("report", "--storage", "sqlite:///study.db", "--json")
    assert study_of(asked.stdout) == document

    exported = command("export", "--storage", "sqlite:///study.db", "--out", "copy")
    assert exported.returncode == 0
    for line in exported.stdout.splitlines():
        assert (tmp_path / line).is_file()
    again = {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    runs = {"verification", "numerics", "ablations"}  # whose logs are in no record
    of_the_run = {name for name in files if runs & set(name.parts) or name.name == "study.json"}
    assert again == set(files) - of_the_run
    for name in again:
        text = (tmp_path / "copy" / name).read_text()
        text = text.replace(str(tmp_path / "copy"), str(results)).replace('"copy/', '"autotuning_results/')
        assert text == files[name]


def test_json_is_all_of_standard_output_in_every_state(tune: Tune, command: Tune) -> None:
    killed = tune("--trials", "3", "--json", kill="running:2")
    assert killed.stdout == ""
    unfinished = study_of(command("report", "--json").stdout)
    assert (unfinished["state"], len(unfinished["trials"])) == ("unfinished", 1)
    finished = tune("--trials", "3", "--json")
    assert study_of(finished.stdout)["state"] == "finished"
    assert "was interrupted and runs again" in finished.stderr
    assert "Best by ZeRO stage" in finished.stderr
    quiet = tune("--trials", "3", "--json", "--quiet")
    assert study_of(quiet.stdout) == study_of(finished.stdout)
    assert quiet.stderr == ""


def test_json_of_a_study_where_nothing_fits(tune: Tune, command: Tune) -> None:
    done = tune("--trials", "3", "--json", answer="nothing fits")
    assert done.returncode == 3
    document = study_of(done.stdout)
    assert (document["state"], document["best"]) == ("nothing_fits", None)
    report = command("report", "--json")
    assert report.returncode == 3
    assert study_of(report.stdout) == document


def test_a_study_that_has_not_begun_is_reported(tune: Tune, command: Tune) -> None:
    tune("--trials", "3", kill="running:1")
    report = command("report", "--json")
    assert report.returncode == 0
    assert (study_of(report.stdout)["state"], study_of(report.stdout)["trials"]) == ("unfinished", [])
    assert command("export", "--out", "copy").returncode == 0


def test_a_pipe_gets_plain_lines(tune: Tune) -> None:
    done = tune("--trials", "2")
    assert ESCAPE not in done.stdout and "\r" not in done.stdout
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("No GPU in use: real DeepSpeed on 2 CPU ranks with gpt2-nano")
    assert "trial 1/2: z0_gas1_tmbspg1 …" in lines
    first, second, *_ = trial_lines(done.stdout)
    assert re.fullmatch(r"#0  z0_gas1_tmbspg1 +\d+\.\d\d ± \d+\.\d\d +\d+\.\d\d  complete  ★ best so far", first)
    assert re.search(r"complete(  ★ best so far)?$", second)
    [heading] = [line for line in lines if line.startswith("#   configuration")]
    # Its headings end where the columns do.
    for words, value in (("samples/s", r" ± \d+\.\d\d"), ("peak GiB", r" ± \S+ +\d+\.\d\d")):
        assert heading.index(words) + len(words) == re.search(value, first).end()  # type: ignore[union-attr]
    assert "Speed-up over the baseline: " in done.stdout
    assert "  autotuning_results/ds_config_optimal.json" in lines
    assert lines[-2] == "Browse the trials:  ds-tune dashboard --results autotuning_results"
    assert lines[-1].startswith("Train with it:  deepspeed --num_gpus 2 --module ds_tune.objectives.rank.train --model")


def test_a_pruned_trial_says_why(tune: Tune) -> None:
    done = tune("--trials", "2", answer="stage 0 does not fit")
    [pruned, _] = trial_lines(done.stdout)
    assert re.match(
        r"#0  z0_gas1_tmbspg1 +– +\d\.\d\d  pruned: out of memory in forward \(peak \d\.\d\d of \d+\.\d\d GiB\)$",
        pruned,
    )
    assert "Inf (the baseline does not run)" in done.stdout or "1.00×" in done.stdout


def test_a_larger_batch_is_pointed_out(tune: Tune) -> None:
    assert "samples, the baseline's 2; --global-batch B searches at one batch size." in tune("--trials", "4").stdout


def test_quiet_prints_nothing(tune: Tune, command: Tune) -> None:
    done = tune("--trials", "1", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    report = command("report", "--quiet")
    assert (report.returncode, report.stdout, report.stderr) == (0, "", "")


def test_the_password_of_the_storage_is_not_in_the_dashboards_command(tune: Tune, tmp_path: Path) -> None:
    done = tune("--trials", "1", "--storage", f"sqlite:///{tmp_path}/s.db?password=hunter2&uri=true")
    assert "hunter2" not in done.stdout + done.stderr


def test_a_reader_that_has_gone_is_no_traceback(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "2").returncode == 0
    for line in ("report | head -n 1", "report --json | true", "export --out copy | true"):
        command = f"{sys.executable} -P -m ds_tune.tuner {line}"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert not re.search("Traceback|BrokenPipe|Exception ignored", done.stderr)


def on_a_terminal(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Runs a program with a terminal for its output."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    process = subprocess.Popen(arguments, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    output = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # EIO: the program and with it the terminal's last user has gone
            break
        if not chunk:
            break
        output += chunk
    os.close(controller)
    return process.wait(), output.decode()


def test_a_terminal_gets_colours(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "2").returncode == 0
    status, output = on_a_terminal([sys.executable, "-P", "-m", "ds_tune.tuner", "report"], tmp_path)
    assert status == 0
    assert ESCAPE in output
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "★ best so far" in plain
    assert "Best configuration" in plain


@pytest.mark.parametrize("variable", ["NO_COLOR"])
def test_a_terminal_without_colours_gets_none(tune: Tune, tmp_path: Path, variable: str) -> None:
    assert tune("--trials", "1").returncode == 0
    line = ["env", f"{variable}=1", sys.executable, "-P", "-m", "ds_tune.tuner", "report"]
    _, output = on_a_terminal(line, tmp_path)
    assert not re.search(r"\x1b\[3[0-7]m", output)
