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
from objectives.machine import detect_machine
from objectives.workload import SHIPPED_MODELS, Workload, check_workload, load_base_ds_config
from storage.document import study_document
from storage.export import export
from storage.layout import ResultsFolder
from storage.records import StudyState, StudySummary
from storage.study_store import StudyStore, storage_fault
from storage.urls import check_storage_url, masked
from tuner import dashboard
from tuner.arguments import dashboard_parser, export_parser, report_parser, tune_parser
from tuner.console import Console
from tuner.space import Limits
from tuner.spec import DEFAULTS, StudySpec, parse_memory, results_folder
from tuner.stopping import StopNow, StopSignals
from tuner.study import Study, quiet_optuna

EXIT_FOUND, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


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
