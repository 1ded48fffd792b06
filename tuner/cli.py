"""The commands: `tune` (which is meant when none is named), `report`, `export` and `dashboard`."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna
import rich.console
import sqlalchemy.exc

from objectives.deepspeed_objective import DeepSpeedObjective
from objectives.errors import DsTuneError, UsageError
from objectives.launcher import LocalLauncher
from objectives.machine import DEFAULT_CPU_RANKS, detect_machine
from objectives.workload import DTYPES, SHIPPED_MODELS, Workload, check_workload, load_base_ds_config
from storage.document import study_document
from storage.export import export
from storage.layout import DEFAULT_RESULTS, ResultsFolder
from storage.records import StudyState, StudySummary
from storage.study_store import StudyStore, storage_fault
from storage.urls import check_storage_url, masked
from tuner import dashboard
from tuner.console import Console
from tuner.space import Limits
from tuner.spec import (
    DEFAULT_STUDY,
    DEFAULT_TRIAL_SECONDS,
    DEFAULT_TRIALS,
    DEFAULTS,
    StudySpec,
    parse_memory,
    results_folder,
)
from tuner.stopping import StopNow, StopSignals
from tuner.study import Study, quiet_optuna

EXIT_FOUND, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


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


def tune(arguments: argparse.Namespace) -> int:
    """Runs or resumes a study."""
    spec = make_spec(arguments)
    # With --json, standard output belongs to the document alone.
    output = rich.console.Console(stderr=arguments.json)
    console = Console(output, quiet=arguments.quiet)
    if spec.machine.device == "cpu":
        console.say(
            f"No GPU in use: real DeepSpeed on {spec.machine.ranks} CPU ranks with {spec.workload.model}; "
            "what is fastest here need not be on a GPU."
        )

    def make_objective(*, fresh_ranks: bool) -> DeepSpeedObjective:
        return DeepSpeedObjective(
            spec.workload,
            spec.machine,
            launcher=LocalLauncher(spec.machine),
            log_folder=spec.results.process_logs.resolve(),
            trial_seconds=spec.trial_seconds,
            fresh_ranks=fresh_ranks,
            notice=console.say,
        )

    objective = make_objective(fresh_ranks=arguments.fresh_ranks)
    verifier = make_objective(fresh_ranks=True)
    interrupted = False
    stop = StopSignals(lambda: console.say("Stopping after this trial; Ctrl-C again stops now."))
    try:
        with stop, console:
            Study(spec, objective, verifier, console, stop).run()
        interrupted = stop.requested
    except StopNow:
        interrupted = True
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise storage_fault(error, spec.storage_url) from error
    store = StudyStore.load(spec.storage_url, spec.study)
    summary = store.summary()
    written = export(summary, spec.results)
    console.finish(summary, written, _dashboard_command(arguments))
    if summary.state is not StudyState.UNFINISHED:
        store.set_more_pending(False)
    _print_document(arguments, summary)
    if interrupted and (summary.state is StudyState.UNFINISHED or (spec.verify and summary.winner is None)):
        console.say("Interrupted; the same command goes on from here.")
        return EXIT_INTERRUPTED
    return _exit_status(summary, console)


def _exit_status(summary: StudySummary, console: Console) -> int:
    if summary.state is StudyState.NOTHING_FITS:
        console.say(f"Nothing fits: {summary.ended or 'every trial ran out of memory'}.")
        return EXIT_NOTHING_FITS
    return EXIT_FOUND


def make_spec(arguments: argparse.Namespace) -> StudySpec:
    """
    Raises:
        UsageError: something asked for cannot be; nothing was run or written yet.
    """
    cap = parse_memory(arguments.memory_cap) if arguments.memory_cap else None
    if arguments.gpus is not None and arguments.gpus < 0:
        raise UsageError(f"--gpus {arguments.gpus}: a number of GPUs, or 0 for the CPU")
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=arguments.ranks, memory_cap_bytes=cap)
    defaults = DEFAULTS[machine.device]
    workload = Workload(
        model=_as_path(arguments.model) if arguments.model else defaults.model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
        pretrained=arguments.pretrained,
        dataset=_as_path(arguments.dataset) if arguments.dataset else None,
        tokenizer=_as_path(arguments.tokenizer) if arguments.tokenizer else None,
        base_ds_config=load_base_ds_config(arguments.ds_config) if arguments.ds_config else {},
    )
    check_workload(workload)
    if machine.device == "cpu" and workload.dtype == "fp16":
        raise UsageError("--dtype fp16 needs a GPU: DeepSpeed on a CPU trains in fp32 or bf16")
    limits = Limits(
        ranks=machine.ranks,
        max_micro_batch=arguments.max_micro_batch or defaults.max_micro_batch,
        max_global_batch=arguments.max_global_batch or defaults.max_samples_per_rank * machine.ranks,
        global_batch=arguments.global_batch,
    )
    limits.check()
    if arguments.storage is not None:
        check_storage_url(arguments.storage)
    results = results_folder(arguments.results)
    return StudySpec(
        study=arguments.study,
        storage_url=arguments.storage or results.storage_url,
        results=results,
        workload=workload,
        machine=machine,
        limits=limits,
        trials=arguments.trials,
        more=arguments.more,
        seed=arguments.seed,
        trial_seconds=float(arguments.trial_timeout),
        verify=not arguments.no_verify,
    )


def _as_path(name: str) -> str:
    """An existing file or folder by its absolute path, so that ranks and commands find it from anywhere."""
    return str(Path(name).resolve()) if name not in SHIPPED_MODELS and Path(name).exists() else name


def report(arguments: argparse.Namespace) -> int:
    """Prints a stored study."""
    summary = _load(arguments).summary()
    console = Console(rich.console.Console(stderr=arguments.json), quiet=arguments.quiet)
    console.study_opened(summary, [])
    for count, record in enumerate(summary.records, start=1):
        console.trial_finished(record, dataclasses.replace(summary, records=summary.records[:count]))
    console.finish(summary, [], _dashboard_command(arguments))
    _print_document(arguments, summary)
    return _exit_status(summary, console)


def export_again(arguments: argparse.Namespace) -> int:
    """Writes a stored study's files."""
    store = _load(arguments)
    folder = results_folder(arguments.out)
    for path in export(store.summary(), folder):
        print(path)
    return EXIT_FOUND


def show_dashboard(arguments: argparse.Namespace) -> int:
    """Serves a stored study."""
    _load(arguments)  # a wrong name is said here, not by the server
    dashboard.serve(_storage_url(arguments), arguments.port)
    return EXIT_FOUND


def _storage_url(arguments: argparse.Namespace) -> str:
    if arguments.storage:
        return str(arguments.storage)
    folder = ResultsFolder(arguments.results)
    if not folder.database.exists():
        raise UsageError(f"there is no study in {arguments.results}; name its folder with --results or its --storage")
    return folder.storage_url


def _load(arguments: argparse.Namespace) -> StudyStore:
    return StudyStore.load(_storage_url(arguments), arguments.study)


def _print_document(arguments: argparse.Namespace, summary: StudySummary) -> None:
    if arguments.json:
        print(json.dumps(study_document(summary), indent=2))


def _dashboard_command(arguments: argparse.Namespace) -> str:
    program = os.environ.get("DS_TUNE_PROGRAM", "ds-tune")
    where = ["--storage", masked(arguments.storage)] if arguments.storage else ["--results", str(arguments.results)]
    return shlex.join([program, "dashboard", *where])


COMMANDS = {
    "tune": (tune_parser, tune),
    "report": (report_parser, report),
    "export": (export_parser, export_again),
    "dashboard": (dashboard_parser, show_dashboard),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in COMMANDS else "tune"
    make_parser, run = COMMANDS[command]
    quiet_optuna()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    try:
        return run(make_parser().parse_args(words))
    except DsTuneError as error:
        print(f"ds-tune: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except BrokenPipeError:
        # The reader of our output has gone (`ds-tune report | head`): nothing is left to tell anybody.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
