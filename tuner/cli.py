"""The commands: `tune` (which is meant when none is named), `plan`, `compare`, `report`, `export`, `run` and
`dashboard`."""

import argparse
import contextlib
import dataclasses
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence

from ds_tune.objectives.errors import DsTuneError, UsageError
from ds_tune.objectives.running.job_environment import without_job
from ds_tune.objectives.trial import Provenance
from ds_tune.objectives.words import counted
from ds_tune.storage.database import storage_faults
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.ownership import check_owner
from ds_tune.storage.records import StudyState, StudySummary
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner import dashboard
from ds_tune.tuner.arguments import (
    dashboard_command,
    dashboard_parser,
    export_parser,
    in_options,
    plan_parser,
    plan_request,
    report_parser,
    run_parser,
    tune_parser,
    tune_request,
)
from ds_tune.tuner.backends import backend_for
from ds_tune.tuner.compare_arguments import compare_parser, compare_request
from ds_tune.tuner.comparison.command import Ending, run_comparison
from ds_tune.tuner.console import Console
from ds_tune.tuner.output import output, replace_what_is_lacking
from ds_tune.tuner.plan import plan_of, print_plan
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.export import export, launch_line
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.spec import make_spec, results_folder
from ds_tune.tuner.stopping import StopNow, StopSignals
from ds_tune.tuner.study import quiet_optuna, run_study

OUTPUT_ERRORS = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}

EXIT_FOUND, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def tune(arguments: argparse.Namespace) -> int:
    """Runs or resumes a study."""
    request = tune_request(arguments, arguments.script)
    if arguments.explain:
        if not request.script:
            raise UsageError("`explain` is about a training script; put its launch line behind --")
        for line in backend_for(request, lambda text: print(text, file=sys.stderr)).notes:
            print(in_options(line))
        return EXIT_FOUND
    # With --json, standard output belongs to the document alone.
    console = Console(output(stderr=arguments.json), quiet=arguments.quiet)
    spec = make_spec(request, backend_for(request, console.say))
    console.verifies = request.verify and spec.backend.verifies
    interrupted = False
    stop = StopSignals(lambda: console.say("Stopping after this trial; Ctrl-C again stops now."))
    try:
        with stop, console:
            run_study(spec, console, stop)
        interrupted = stop.requested
    except StopNow:
        interrupted = True
    try:
        store = StudyStore.load(spec.storage_url, request.study)
    except UsageError:
        if interrupted:  # before there was a study
            raise KeyboardInterrupt from None
        raise
    summary = store.summary()
    found = Report.of(summary)
    written = export(found, spec.results)
    browse = dashboard_command(arguments.storage, arguments.results)
    console.finish(found, written, browse, launch_line(summary, spec.results))
    if summary.state is not StudyState.UNFINISHED:
        store.set_more_pending(False)
    _print_document(arguments, found)
    if interrupted and summary.goes_on:
        console.say("Interrupted; the same command goes on from here.")
        return EXIT_INTERRUPTED
    return _exit_status(summary, console)


def _exit_status(summary: StudySummary, console: Console) -> int:
    if summary.state is StudyState.NOTHING_FITS:
        trials = f"none of {counted(summary.finished_trials, 'trial')} did; --more M tries M more"
        console.say(f"Nothing fits: {summary.ended}." if summary.ended else f"Nothing has fitted so far: {trials}.")
        return EXIT_NOTHING_FITS
    return EXIT_FOUND


def plan(arguments: argparse.Namespace) -> int:
    """Predicts, without running anything."""
    found = plan_of(plan_request(arguments), each_accumulation=arguments.json)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    elif not arguments.quiet:
        print_plan(found, output(), details=arguments.details)
    return EXIT_FOUND if found.fitting else EXIT_NOTHING_FITS


def compare(arguments: argparse.Namespace) -> int:
    """Runs or resumes a comparison."""
    ending = run_comparison(compare_request(arguments), quiet=arguments.quiet, as_json=arguments.json)
    return {
        Ending.COMPLETE: EXIT_FOUND,
        Ending.NOTHING_RUNS: EXIT_NOTHING_FITS,
        Ending.INTERRUPTED: EXIT_INTERRUPTED,
        Ending.LEFT_OUT: EXIT_ERROR,
    }[ending]


def report(arguments: argparse.Namespace) -> int:
    """Prints a stored study."""
    summary = _load(arguments).summary()
    console = Console(output(stderr=arguments.json), quiet=arguments.quiet)
    console.study_opened(summary, [])
    for count, record in enumerate(summary.records, start=1):
        # As it looked then: nothing was known yet of any loss.
        console.trial_finished(record, dataclasses.replace(summary, records=summary.records[:count], numerics={}))
    found = Report.of(summary)
    browse = dashboard_command(arguments.storage, arguments.results)
    console.finish(found, [], browse, launch_line(summary, ResultsFolder(arguments.results)))
    _print_document(arguments, found)
    return _exit_status(summary, console)


def launch(arguments: argparse.Namespace) -> int:
    """Launches a study's winner for real, in place of this process."""
    summary = _load(arguments).summary()
    command = ResultsFolder(arguments.results).optimal_command.resolve()
    if summary.best is None:
        raise UsageError(f"the study in {arguments.results} has no winner yet")
    if summary.provenance is not Provenance.MEASURED:
        raise UsageError(f"the winner in {arguments.results} is of {summary.provenance.value} figures: nothing was run")
    if not command.exists():
        raise UsageError(f"{command} is missing; tune export writes it again")
    if by_hand := summary.workload.by_hand(summary.best.config):
        raise UsageError(f"the launch line alone does not train with the winner. {' '.join(by_hand)}")
    folder = summary.workload.launch_folder
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise UsageError(f"{folder}, where the script is, cannot be entered ({error.strerror})") from error
    sys.stdout.flush()
    os.execvpe("sh", ["sh", str(command)], without_job(os.environ))


def export_again(arguments: argparse.Namespace) -> int:
    """Writes a stored study's files."""
    store = _load(arguments)
    check_owner(ResultsFolder(arguments.out), store.study.study_name, _storage_url(arguments), field="out")
    folder = results_folder(arguments.out, field="out")
    for path in export(Report.of(store.summary()), folder):
        print(path)
    return EXIT_FOUND


def show_dashboard(arguments: argparse.Namespace) -> int:
    """Serves a stored study."""
    _load(arguments)  # a wrong name is said here, not by the server
    dashboard.serve(_storage_url(arguments), arguments.port)
    return EXIT_FOUND


def _storage_url(arguments: argparse.Namespace) -> str:
    """The database that a command is about, whether it is there or not."""
    return arguments.storage or ResultsFolder(arguments.results).storage_url


def _load(arguments: argparse.Namespace) -> StudyStore:
    if not arguments.storage and not ResultsFolder(arguments.results).database.exists():
        raise UsageError(f"there is no study in {arguments.results}; name its folder with --results or its --storage")
    return StudyStore.load(_storage_url(arguments), arguments.study)


def _print_document(arguments: argparse.Namespace, found: Report) -> None:
    if arguments.json:
        print(in_options(json.dumps(study_document(found), indent=2)))


COMMANDS = {
    "tune": (tune_parser, tune),
    "plan": (plan_parser, plan),
    "compare": (compare_parser, compare),
    "report": (report_parser, report),
    "export": (export_parser, export_again),
    "run": (run_parser, launch),
    "dashboard": (dashboard_parser, show_dashboard),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in COMMANDS else "tune"
    make_parser, run = COMMANDS[command]
    quiet_optuna()
    replace_what_is_lacking()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    try:
        script = None
        if command == "tune" and "--" in words:
            words, script = words[: words.index("--")], words[words.index("--") + 1 :]
            if not script:
                raise UsageError("nothing comes behind --: write the line that launches your training there")
        arguments = make_parser().parse_args(words)
        arguments.script = script or ()
        with storage_faults(_storage_url(arguments)) if "storage" in arguments else contextlib.nullcontext():
            status = run(arguments)
        sys.stdout.flush()  # what cannot be written is said here, not by the interpreter in its last moment
        return status
    except DsTuneError as error:
        print(f"ds-tune: {in_options(str(error))}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except BrokenPipeError:
        # The reader of our output has gone (`ds-tune report | head`): nothing is left to tell anybody.
        _forget_output()
        return EXIT_ERROR
    except OSError as error:
        print(f"ds-tune: {_system_fault(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _forget_output()
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("ds-tune: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _system_fault(error: OSError) -> str:
    """The sentence for what nobody foresaw: which file it was, and what the system said."""
    path = error.filename2 or error.filename
    said = error.strerror or str(error)
    if path is not None:
        return f"{path} cannot be used ({said}); put that right and repeat the command"
    if error.errno in OUTPUT_ERRORS:  # files say their names; of what is printed, the system has none
        return f"the output cannot be written ({said}); direct it elsewhere"
    return f"the system refused what it was asked for ({said}); put that right and repeat the command"


def _forget_output() -> None:
    """Has what is left of the output go nowhere: the interpreter would try once more to write it."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
