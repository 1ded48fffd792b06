"""What the commands answer to options that cannot be: one sentence, exit status 2, nothing written."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.tuner.arguments import tune_parser
from ds_tune.tuner.cli import COMMANDS, main

CPU = ["--gpus", "0"]

SIMULATE = ["tune", "--hardware", "2xH100", "--simulate"]

WRONG: dict[str, tuple[list[str], str]] = {
    "no trials": (["--trials", "0"], "argument --trials: 0 is not a whole number from 1 on"),
    "half a trial": (["--trials", "1.5"], "argument --trials: 1.5 is not a whole number from 1 on"),
    "trials and more": (["--trials", "3", "--more", "2"], "--more: not allowed with argument --trials"),
    "no more": (["--more", "0"], "argument --more: 0 is not"),
    "negative seed": (["--seed", "-1"], "argument --seed: -1 is not a whole number from 0 on"),
    "unknown option": (["--zero", "3"], "unrecognized arguments: --zero 3"),
    "unknown command": (["tuen"], "unrecognized arguments: tuen"),
    "missing value": (["--model"], "argument --model: expected one argument"),
    "unknown model": (["--model", "gpt5"], "--model gpt5 is neither a file, a folder nor a hub id"),
    "model folder": (["--model", "empty"], "empty has no config.json; name a folder"),
    "unknown precision": (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    "fp16 on a CPU": (["--dtype", "fp16"], "--dtype fp16 needs a GPU"),
    "long samples": (["--seq-len", "4096"], "gpt2-nano takes at most 256 positions; --seq-len 4096 is too long"),
    "short samples": (["--seq-len", "1"], "--seq-len must be at least 2 (got 1)"),
    "missing data": (["--dataset", "nothing/*.txt/x"], "--dataset nothing/*.txt/x: no such file"),
    "missing ds-config": (["--ds-config", "no.json"], "--ds-config no.json cannot be read (No such file or directory)"),
    "broken ds-config": (["--ds-config", "broken.json"], "--ds-config broken.json is not JSON"),
    "ds-config list": (["--ds-config", "list.json"], "--ds-config list.json must hold a JSON object"),
    "ds-config word": (["--ds-config", "word.json"], "--ds-config word.json: optimizer must be an object"),
    "tokens of nothing": (["--tokenizer", "t"], "--tokenizer t is for the text of --dataset, and synthetic tokens"),
    "nested tokens": (
        ["--dataset", "nested.jsonl"],
        "nested.jsonl: column input_ids is a list of lists of integers, and token ids must be a list of integers",
    ),
    "no such column": (
        ["--dataset", "nested.jsonl", "--text-column", "a"],
        "--text-column a is no column of --dataset",
    ),
    "column of nothing": (["--text-column", "a"], "--text-column a is of --dataset, and there is none; add it"),
    "padding of nothing": (["--no-packing"], "--no-packing is of the samples of --dataset, and synthetic tokens"),
    "no data": (["--dataset", "nothing.txt"], "nothing.txt is empty; name files with text or token ids in them"),
    "impossible model": (["--model", "seven.json"], "seven.json cannot be built: its n_embd of 768 cannot be divided"),
    "micro-batch": (["--max-micro-batch", "0"], "argument --max-micro-batch: 0 is not"),
    "both batches": (["--global-batch", "4", "--max-global-batch", "4"], "not allowed with argument"),
    "odd batch": (["--global-batch", "7"], "--global-batch 7 must be a multiple of the 2 ranks"),
    "small batch": (["--max-global-batch", "1"], "--max-global-batch 1 is less than one sample on each of 2 ranks"),
    "negative GPUs": (["--gpus", "-1"], "--gpus -1: a number of GPUs, or 0 for the CPU"),
    "too many GPUs": (["--gpus", "99"], "--gpus 99: "),
    "no ranks": (["--ranks", "0"], "argument --ranks: 0 is not"),
    "memory": (["--memory-cap", "lots"], "--memory-cap lots: write a size such as 24GiB or 512MiB"),
    "too much memory": (["--memory-cap", "9999GiB"], "is more than a rank has here"),
    "timeout": (["--trial-timeout", "0"], "argument --trial-timeout: 0 is not"),
    "results file": (["--results", "list.json"], "--results list.json cannot be written to (File exists)"),
    "no URL": (["--storage", "study"], "--storage is not a database URL; write sqlite:///FILE"),
    "database folder": (["--storage", "sqlite:///none/s.db"], "--storage sqlite:///none/s.db: there is no folder"),
    "database in memory": (["--storage", "sqlite:///:memory:"], "--storage must name a file"),
    "port of a URL": (["--storage", "postgresql://u:secret@h:x/d"], "--storage is not a database URL"),
    "other database": (["--storage", "oracle://u:secret@h/d"], "must be one of sqlite, postgresql, mysql"),
    "report of nothing": (["report"], "there is no study in autotuning_results; name its folder with --results"),
    "report of another": (["report", "--storage", "sqlite:///none.db"], "sqlite:///none.db"),
    "export of nothing": (["export", "--out", "out"], "there is no study in autotuning_results"),
    "export to nowhere": (["export"], "the following arguments are required: --out"),
    "dashboard of nothing": (["dashboard"], "there is no study in autotuning_results"),
    "unknown sampler": (["--sampler", "best"], "argument --sampler: invalid choice: 'best' (choose from 'cost-model'"),
    "sampler of nobody": (["--sampler"], "argument --sampler: expected one argument"),
    "imagined for nothing": (["tune", "--hardware", "2xH200"], "--hardware imagines GPUs; add --simulate to search on"),
    "simulated on what": (["tune", "--simulate"], "--simulate needs to know on what: add --hardware, such as"),
    "imagined GPU": (["tune", "--hardware", "2xH900", "--simulate"], "--hardware 2xH900: write a number and a GPU"),
    "two sizes of one": (["tune", "--hardware", "A100", "--simulate"], "say which: A100-40GB, A100-80GB"),
    "no imagined GPU": (["tune", "--hardware", "0xH200", "--simulate"], "--hardware 0xH200: at least one GPU"),
    "imagined data": ([*SIMULATE, "--dataset", "t.txt"], "--simulate does not go with --dataset: nothing is trained"),
    "imagined tokens": ([*SIMULATE, "--tokenizer", "t"], "--simulate does not go with --tokenizer"),
    "imagined weights": ([*SIMULATE, "--pretrained"], "--simulate does not go with --pretrained"),
    "imagined and here": ([*SIMULATE, "--gpus", "1"], "--simulate does not go with --gpus"),
    "imagined on a CPU": ([*SIMULATE, "--gpus", "0"], "--simulate does not go with --gpus"),
    "imagined ranks": ([*SIMULATE, "--ranks", "2"], "--simulate does not go with --ranks"),
    "imagined timeout": ([*SIMULATE, "--trial-timeout", "9"], "--simulate does not go with --trial-timeout"),
    "imagined processes": (
        [*SIMULATE, "--fresh-ranks", "--gpus", "1"],
        "--simulate does not go with --gpus, --fresh-ranks",
    ),
    "imagined and recorded": ([*SIMULATE, "--replay", "r.jsonl"], "--replay does not go with --hardware, --simulate: "),
    "simulated recording": (["tune", "--simulate", "--replay", "r.jsonl"], "--replay does not go with --simulate: "),
    "imagined memory": ([*SIMULATE, "--memory-cap", "80GiB"], "--memory-cap is more than an H100 has (79.1 GiB)"),
    "imagined cap": ([*SIMULATE, "--memory-cap", "lots"], "--memory-cap lots: write a size such as 24GiB"),
    "imagined batch": ([*SIMULATE, "--global-batch", "7"], "--global-batch 7 must be a multiple of the 2 ranks"),
    "imagined length": ([*SIMULATE, "--seq-len", "4096"], "gpt2-xl takes at most 1024 positions"),
    "imagined hub": ([*SIMULATE, "--model", "owner/name"], "owner/name: its config.json cannot be had from the hub"),
    "imagined precision": (
        ["tune", "--hardware", "V100-32GB", "--simulate", "--dtype", "bf16"],
        "V100-32GB has no bf16; use fp16",
    ),
    "plan of nothing": (["plan", "--hardware", "H900"], "--hardware H900: write a number and a GPU, such as"),
    "no name": (["--dataset", ""], "argument --dataset: its value is empty; write one, or leave the option out"),
    "plan of any": (["plan", "--hardware", ""], "argument --hardware: its value is empty"),
    "plan of two sizes": (["plan", "--hardware", "8xV100"], "say which: V100-16GB, V100-32GB"),
    "plan of no GPU": (["plan", "--hardware", "0xH200"], "--hardware 0xH200: at least one GPU"),
    "plan of a cap": (["plan", "--hardware", "RTX4090", "--memory-cap", "24GiB"], "an RTX4090 has (23.6 GiB)"),
    "plan in bf16": (["plan", "--hardware", "T4", "--dtype", "bf16"], "--dtype bf16: "),
    "plan in fp8": (["plan", "--hardware", "H100", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    "plan of a model": (["plan", "--hardware", "H100", "--model", "gpt5"], "--model gpt5 is neither a file, a folder"),
    "plan of a folder": (["plan", "--hardware", "H100", "--model", "empty"], "empty has no config.json"),
    "plan of a file": (["plan", "--hardware", "H100", "--model", "list.json"], "list.json is no Hugging Face config"),
    "plan of an impossible model": (["plan", "--hardware", "H100", "--model", "seven.json"], "among 7 heads (n_head)"),
    "plan of a batch": (["plan", "--hardware", "2xH100", "--global-batch", "7"], "must be a multiple of the 2 ranks"),
    "plan of no batch": (["plan", "--hardware", "4xH100", "--max-global-batch", "3"], "--max-global-batch 3 is less"),
    "plan of none": (["plan", "--best", "0"], "argument --best: 0 is not a whole number from 1 on"),
    "plan of trials": (["plan", "--trials", "9"], "unrecognized arguments: --trials 9"),
    "plan of a study": (["plan", "--simulate"], "unrecognized arguments: --simulate"),
    "dashboard beyond ports": (
        ["dashboard", "--port", "65536"],
        "argument --port: 65536 is not a port, which go up to",
    ),
    "dashboard port": (["dashboard", "--port", "0"], "argument --port: 0 is not a whole number from 1 on"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "word.json").write_text('{"optimizer": "AdamW"}')
    (tmp_path / "seven.json").write_text('{"model_type": "gpt2", "n_head": 7}')
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "nested.jsonl").write_text('{"input_ids": [[1, 2]]}\n')
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_impossible_options_exit_with_2_and_one_sentence_and_write_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, sentence = WRONG[case]
    before = sorted(folder.rglob("*"))
    on_the_cpu = [] if arguments[0] in COMMANDS or "--gpus" in arguments else CPU
    assert main([*on_the_cpu, *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("ds-tune: ")
    assert sentence in error
    assert error.count("\n") == 1 and error.endswith("\n")
    assert "secret" not in error
    assert sorted(folder.rglob("*")) == before


EMPTY = {
    (command, action.option_strings[-1])
    for command, (make_parser, _) in COMMANDS.items()
    for action in make_parser()._actions
    if action.option_strings and action.nargs is None
}


@pytest.mark.parametrize(("command", "option"), sorted(EMPTY))
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_value_is_never_taken_for_none(command: str, option: str, value: str) -> None:
    make_parser, _ = COMMANDS[command]
    with pytest.raises(UsageError, match=f"^argument {option}: "):
        make_parser().parse_args([option, value])


@pytest.mark.parametrize(
    "option",
    [
        "--dataset", "--memory-cap", "--results", "--model", "--ds-config", "--space", "--tokenizer", "--study",
        "--storage", "--hardware", "--replay", "--allow",
    ],
)  # fmt: skip
def test_an_empty_value_is_named_as_what_it_is(option: str) -> None:
    with pytest.raises(UsageError) as refused:
        tune_parser().parse_args([f"{option}="])
    assert f"argument {option}: its value is empty; write one, or leave the option out" in str(refused.value)


def test_a_command_may_be_named_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for words in (["--help"], ["tune", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(words)
        assert done.value.code == 0
        helps.append(capsys.readouterr().out)
    assert helps[0] == helps[1]
    assert all(f"tune {name}" in helps[0] for name in COMMANDS if name != "tune")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_at_once_and_loads_nothing_heavy(name: str) -> None:
    script = (
        "import resource, sys, ds_tune.tuner.cli\n"
        "try: ds_tune.tuner.cli.main(sys.argv[1:])\n"
        "finally:\n"
        "    print(*{'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: tune")
    loaded, processor_seconds = done.stderr.splitlines()
    assert loaded == ""
    # Processor time: a busy machine takes longer by the clock. It is about 0.6 s; torch alone would be 3 s more.
    assert float(processor_seconds) < 2


def test_every_option_says_what_it_does() -> None:
    for make_parser, _ in COMMANDS.values():
        for action in make_parser()._actions:
            assert action.help, action.option_strings


DOCUMENTATION = Path(__file__).parents[2] / "docs" / "options.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_documentation_s_table_of_its_command(name: str) -> None:
    sections = re.split(r"^## ", DOCUMENTATION.read_text(), flags=re.MULTILINE)
    [section] = [section for section in sections if name in section.splitlines()[0].split(", ")]
    table = "".join(line.split(" | ")[0] for line in section.splitlines() if line.startswith("| "))
    documented = set(re.findall(r"`(--[\w-]+)", table))
    options = {option for action in COMMANDS[name][0]()._actions for option in action.option_strings}
    missing = options - documented - {"-h", "--help"}
    assert not missing
    assert documented <= options or name in ("report", "export", "run", "dashboard")  # which have one table


def test_the_same_folder_names_do_not_shadow_the_program(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A person's own tuner.py or storage/ lies in the folder where the command is typed."""
    (tmp_path / "tuner.py").write_text("raise SystemExit('wrong tuner')\n")
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "__init__.py").write_text("raise SystemExit('wrong storage')\n")
    assert command("--help").returncode == 0
