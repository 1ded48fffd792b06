"""The command line: every option of every command, and what it takes."""

import argparse
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.cost_model.hardware import CATALOGUE
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import DEFAULT_CPU_RANKS
from ds_tune.objectives.metric import DEFAULT_METRIC, METRICS
from ds_tune.objectives.words import plain
from ds_tune.objectives.workload.huggingface import DTYPES, SHIPPED_MODELS
from ds_tune.storage.layout import DEFAULT_RESULTS
from ds_tune.storage.urls import masked
from ds_tune.tuner.dimensions import PRESETS
from ds_tune.tuner.request import (
    DEFAULT_SAMPLER,
    DEFAULT_STUDY,
    DEFAULT_TRIAL_SECONDS,
    DEFAULT_TRIALS,
    NUMERICS,
    SAMPLER_NAMES,
    PlanRequest,
    SearchRequest,
    TuneRequest,
    as_fields,
)


class Parser(argparse.ArgumentParser):
    """argparse, ending usage errors in one sentence as all of ds-tune's do, and taking no empty values."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # What argparse reads a text and a path with.
        self.register("type", None, filled)
        self.register("type", Path, lambda text: Path(filled(text)))

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} ({self.prog} --help shows the options)")


def filled(text: str) -> str:
    """An argparse type: any text but an empty one, which is a shell's variable that was never set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("its value is empty; write one, or leave the option out")
    return text


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    return _whole(text, "a whole number from 1 on", least=1)


def not_negative(text: str) -> int:
    """An argparse type: a whole number from 0 on."""
    return _whole(text, "a whole number from 0 on", least=0)


def whole(text: str) -> int:
    """An argparse type: a whole number."""
    return _whole(text, "a whole number")


def port(text: str) -> int:
    """An argparse type: a port of TCP."""
    value = positive(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port, which go up to 65535")
    return value


def _whole(text: str, words: str, *, least: int | None = None) -> int:
    if re.fullmatch(r"\s*[+-]?[0-9_]+\s*", text) and len(text) > MOST_CHARACTERS:
        raise argparse.ArgumentTypeError(f"a number of {len(text)} characters is too large")
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or (least is not None and value < least):
        raise argparse.ArgumentTypeError(f"{plain(text)} is not {words}")
    return value


MOST_CHARACTERS = 25
"""Of a number: larger than 2^63 in any case, and up to there the sentence can repeat it."""


def tune_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tune",
        description="Finds the fastest DeepSpeed configuration for a model on this machine by training with it.",
        usage="tune [options] [-- train.py ...]",
        epilog="Other commands: tune plan, tune compare, tune report, tune export, tune run, tune dashboard (each with "
        "--help). The same command again resumes a study. Exit status: 0 found, 1 error, 2 usage, 3 nothing fits, "
        "130 interrupted and resumable.",
    )
    study = parser.add_argument_group("study")
    amount = study.add_mutually_exclusive_group()
    amount.add_argument(
        "--trials",
        type=positive,
        default=DEFAULT_TRIALS,
        metavar="N",
        help="finished trials the study is to have (default %(default)s)",
    )
    amount.add_argument("--more", type=positive, metavar="M", help="add M trials to a finished study")
    study.add_argument(
        "--study", metavar="NAME", default=DEFAULT_STUDY, help="name in the storage (default %(default)s)"
    )
    study.add_argument("--storage", metavar="URL", help="database of the study (default: SQLite in the results folder)")
    study.add_argument(
        "--results",
        type=Path,
        default=Path(DEFAULT_RESULTS),
        metavar="DIR",
        help="folder for the results (default %(default)s)",
    )
    study.add_argument(
        "--sampler",
        choices=SAMPLER_NAMES,
        default=DEFAULT_SAMPLER,
        help="who proposes: ds-tune's cost model, or one of Optuna's ways (default %(default)s)",
    )
    study.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of the search (default %(default)s)")
    study.add_argument(
        "--metric",
        choices=tuple(METRICS),
        default=DEFAULT_METRIC,
        help="what is maximised; all order configurations alike (default %(default)s)",
    )
    work = parser.add_argument_group("what is trained")
    add_model_options(work)
    work.add_argument(
        "--dataset",
        metavar="FILES",
        help="local text, JSON, CSV, Parquet or Arrow files, a folder of them, or a hub id (default: synthetic tokens)",
    )
    work.add_argument(
        "--text-column", metavar="NAME", help="column of --dataset to train on (default: found out, and said)"
    )
    work.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="cut the samples of --dataset, joined, into full sequences, instead of padding each (default)",
    )
    work.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder or hub id of the tokenizer for --dataset (default: the model's)",
    )
    work.add_argument("--pretrained", action="store_true", help="load the model's weights instead of initialising them")
    work.add_argument(
        "--ds-config",
        type=Path,
        metavar="FILE",
        help="your DeepSpeed file: the yardstick, and trials keep all of it that is not searched",
    )
    script = parser.add_argument_group("a training script of your own", "its launch line comes last, behind --")
    script.add_argument("--explain", action="store_true", help="say what is recognised of it, and run no trial")
    script.add_argument(
        "--free-batch",
        action="store_true",
        help="let the global batch change; the script's own, or that of --ds-config, is held otherwise",
    )
    script.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="KEY=OPTION",
        help="an option of the script that follows a setting of DeepSpeed's and is not found by itself, such as "
        "train_micro_batch_size_per_gpu=--rows; may be repeated",
    )
    _add_space_options(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpus", type=whole, metavar="N", help="use the first N visible GPUs (default all; 0 runs on the CPU)"
    )
    machine.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help=f"ranks to start on the CPU (default {DEFAULT_CPU_RANKS})",
    )
    add_memory_cap(machine)
    machine.add_argument(
        "--trial-timeout",
        type=positive,
        metavar="S",
        help=f"kill a trial after S seconds (default {DEFAULT_TRIAL_SECONDS:.0f})",
    )
    machine.add_argument(
        "--fresh-ranks", action="store_true", help="start new processes for every trial instead of keeping them"
    )
    machine.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="don't run the fastest trials and the baseline again to be sure",
    )
    machine.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="train nothing: answer from a surface recorded by benchmarks/record_surface.py",
    )
    machine.add_argument(
        "--simulate", action="store_true", help="train nothing: answer from the cost model, for --hardware"
    )
    _add_hardware(machine)
    add_output_options(parser)
    return parser


def add_model_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model",
        help=f"{', '.join(SHIPPED_MODELS)}, a folder or config.json, or a hub id (default gpt2-xl; on CPU gpt2-nano)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision (default: that of --ds-config, else the model's, else fp16, on CPU fp32)",
    )
    group.add_argument("--seq-len", type=positive, metavar="S", help="tokens a sample (default 1024; on CPU 128)")


def _add_space_options(parser: argparse.ArgumentParser) -> None:
    space = parser.add_argument_group("search space")
    space.add_argument(
        "--preset",
        choices=PRESETS,
        default=None,
        help="core: ZeRO stage, mbs and gas; speed: and what usually pays; full: every knob (default core)",
    )
    space.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="your own space instead of a preset: values, ranges and constraints in TOML or YAML (docs/knobs.md)",
    )
    space.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="numerics:KNOB",
        help=f"also search a knob that changes the numbers: {', '.join(NUMERICS)}",
    )
    space.add_argument("--max-micro-batch", type=positive, metavar="B", help="largest mbs (default 64; on CPU 16)")
    batch = space.add_mutually_exclusive_group()
    batch.add_argument(
        "--max-global-batch",
        type=positive,
        metavar="B",
        help="largest mbs × gas × ranks (default 128 a GPU; 32 a CPU rank)",
    )
    batch.add_argument("--global-batch", type=positive, metavar="B", help="search at exactly this mbs × gas × ranks")


def add_memory_cap(group: argparse._ActionsContainer) -> None:
    group.add_argument("--memory-cap", metavar="SIZE", help="most memory a rank may have, such as 24GiB")


def _add_hardware(group: argparse._ActionsContainer) -> None:
    group.add_argument("--hardware", metavar="GPUS", help="imagined GPUs, such as 16xV100-32GB (see tune plan --help)")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document; everything else goes to stderr")
    output.add_argument("--quiet", action="store_true", help="show errors only")


def in_options(text: str) -> str:
    """A text for the command line: fields in backticks as its options, `gpus=0` as --gpus 0.

    Other words in backticks stay as they are.
    """

    def option(field: re.Match[str]) -> str:
        action = _options().get(field[1])
        if action is None:
            return field[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[field[2] == "False"]
        value = "" if field[2] is None or action.nargs == 0 else f" {field[2]}"
        return action.option_strings[-1] + value

    return _FIELD.sub(option, text)


_FIELD = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


@functools.cache
def _options() -> dict[str, argparse.Action]:
    """The options of all commands, by the fields that they fill."""
    parsers = (tune_parser(), plan_parser(), report_parser(), export_parser(), run_parser(), dashboard_parser())
    return {action.dest: action for parser in parsers for action in parser._actions if action.dest != "help"}


def dashboard_command(storage: str | None, results: Path) -> str:
    """The line for a shell that shows a study in optuna-dashboard; a password in its URL is left out."""
    program = os.environ.get("DS_TUNE_PROGRAM", "ds-tune")
    where = ["--storage", masked(storage)] if storage else ["--results", str(results)]
    return shlex.join([program, "dashboard", *where])


def tune_request(arguments: argparse.Namespace, script: Sequence[str] = ()) -> TuneRequest:
    """The request that the options of `tune` make.

    Args:
        script: what came behind --.

    Raises:
        UsageError: they do not go together.
    """
    return TuneRequest(**_fields(TuneRequest, arguments), script=tuple(script))


def plan_request(arguments: argparse.Namespace) -> PlanRequest:
    """The request that the options of `plan` make; those that it does not have are at their defaults.

    Raises:
        UsageError: they do not go together.
    """
    return PlanRequest(**_fields(PlanRequest, arguments))


def _fields(request: type[SearchRequest], arguments: argparse.Namespace) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(request) if field.name != "script")
    return as_fields({name: getattr(arguments, name) for name in names if name in arguments})


def _stored_study_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"tune {command}", description=description)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(DEFAULT_RESULTS),
        metavar="DIR",
        help="the study's results folder (default %(default)s)",
    )
    parser.add_argument(
        "--storage", metavar="URL", help="database of the study (default: SQLite in the results folder)"
    )
    parser.add_argument("--study", metavar="NAME", help="its name (default: the only one there)")
    return parser


def plan_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tune plan",
        description="Predicts what would fit and how fast it would be, without a GPU.",
        epilog=f"Known GPUs: {', '.join(CATALOGUE)}; a number before them, as in 8xH100, for several, "
        "two for nodes and the GPUs of each, as in 8x8xH100; also machines of clouds, such as p4d.24xlarge.",
    )
    add_model_options(parser.add_argument_group("what is trained"))
    _add_space_options(parser)
    machine = parser.add_argument_group("machine")
    _add_hardware(machine)
    add_memory_cap(machine)
    parser.add_argument(
        "--best", type=positive, default=6, metavar="N", help="configurations to show (default %(default)s)"
    )
    parser.add_argument(
        "--details", action="store_true", help="also show what takes the memory, and what does not fit, kind by kind"
    )
    add_output_options(parser)
    return parser


def report_parser() -> argparse.ArgumentParser:
    parser = _stored_study_parser("report", "Prints the report of a study again, from its storage alone.")
    add_output_options(parser)
    return parser


def export_parser() -> argparse.ArgumentParser:
    parser = _stored_study_parser("export", "Writes the result files of a study again, from its storage alone.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    return parser


def run_parser() -> argparse.ArgumentParser:
    return _stored_study_parser("run", "Launches the winner of a study for real: trains with it to the end.")


def dashboard_parser() -> argparse.ArgumentParser:
    parser = _stored_study_parser("dashboard", "Serves optuna-dashboard for a study on 127.0.0.1 until Ctrl-C.")
    parser.add_argument("--port", type=port, default=8080, help="port to listen on (default %(default)s)")
    return parser
