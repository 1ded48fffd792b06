"""The command line: every option of every command, and what it takes."""

import argparse
from pathlib import Path

from objectives.errors import UsageError
from objectives.machine import DEFAULT_CPU_RANKS
from objectives.workload import DTYPES, SHIPPED_MODELS
from storage.layout import DEFAULT_RESULTS
from tuner.spec import DEFAULT_STUDY, DEFAULT_TRIAL_SECONDS, DEFAULT_TRIALS


class _Parser(argparse.ArgumentParser):
    """argparse, ending usage errors in one sentence as all of ds-tune's do."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} ({self.prog} --help shows the options)")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def not_negative(text: str) -> int:
    """An argparse type: a whole number from 0 on."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
    return int(text)


def tune_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tune",
        description="Finds the fastest DeepSpeed configuration for a model on this machine by training with it.",
        epilog="Other commands: tune report, tune export, tune dashboard (each with --help). "
        "The same command again resumes a study. Exit status: 0 found, 1 error, 2 usage, 3 nothing fits, "
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
    study.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of the search (default %(default)s)")
    work = parser.add_argument_group("what is trained")
    work.add_argument(
        "--model",
        help=f"{', '.join(SHIPPED_MODELS)}, a folder or config.json, or a hub id (default gpt2-xl; on CPU gpt2-nano)",
    )
    work.add_argument("--dtype", choices=DTYPES, help="precision (default fp16; on CPU fp32)")
    work.add_argument("--seq-len", type=positive, metavar="S", help="tokens a sample (default 1024; on CPU 128)")
    work.add_argument(
        "--dataset",
        metavar="FILES",
        help="local text, JSON, CSV or Parquet files, or a hub id (default: synthetic tokens)",
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
        help="your DeepSpeed configuration; trials keep all of it that is not searched",
    )
    space = parser.add_argument_group("search space")
    space.add_argument("--max-micro-batch", type=positive, metavar="B", help="largest mbs (default 64; on CPU 16)")
    batch = space.add_mutually_exclusive_group()
    batch.add_argument(
        "--max-global-batch",
        type=positive,
        metavar="B",
        help="largest mbs × gas × ranks (default 128 a GPU; 32 a CPU rank)",
    )
    batch.add_argument("--global-batch", type=positive, metavar="B", help="search at exactly this mbs × gas × ranks")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpus", type=int, metavar="N", help="use the first N visible GPUs (default all; 0 runs on the CPU)"
    )
    machine.add_argument(
        "--ranks",
        type=positive,
        default=DEFAULT_CPU_RANKS,
        metavar="N",
        help="ranks to start on the CPU (default %(default)s)",
    )
    machine.add_argument("--memory-cap", metavar="SIZE", help="most memory a rank may have, such as 24GiB")
    machine.add_argument(
        "--trial-timeout",
        type=positive,
        default=int(DEFAULT_TRIAL_SECONDS),
        metavar="S",
        help="kill a trial after S seconds (default %(default)s)",
    )
    machine.add_argument(
        "--fresh-ranks", action="store_true", help="start new processes for every trial instead of keeping them"
    )
    machine.add_argument(
        "--no-verify", action="store_true", help="don't run the fastest trials and the baseline again to be sure"
    )
    _add_output_options(parser)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document; everything else goes to stderr")
    output.add_argument("--quiet", action="store_true", help="show errors only")


def _stored_study_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"tune {command}", description=description)
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


def report_parser() -> argparse.ArgumentParser:
    parser = _stored_study_parser("report", "Prints the report of a study again, from its storage alone.")
    _add_output_options(parser)
    return parser


def export_parser() -> argparse.ArgumentParser:
    parser = _stored_study_parser("export", "Writes the result files of a study again, from its storage alone.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    return parser


def dashboard_parser() -> argparse.ArgumentParser:
    parser = _stored_study_parser("dashboard", "Serves optuna-dashboard for a study on 127.0.0.1 until Ctrl-C.")
    parser.add_argument("--port", type=positive, default=8080, help="port to listen on (default %(default)s)")
    return parser
