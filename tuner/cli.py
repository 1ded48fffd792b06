"""The commands: `tune` (which is meant when none is named), `plan`, `report`, `export` and `dashboard`."""

import argparse
import contextlib
import dataclasses
import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence

import rich.console

from ds_tune.objectives.cost_model.hardware import hardware_of, machine_of
from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.errors import DsTuneError, UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.metric import check_metric
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.storage.database import storage_faults
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.ownership import check_owner
from ds_tune.storage.records import StudyState, StudySummary
from ds_tune.storage.study_store import StudyStore
from ds_tune.storage.urls import check_storage_url, masked
from ds_tune.tuner import dashboard
from ds_tune.tuner.arguments import NUMERICS, dashboard_parser, export_parser, plan_parser, report_parser, tune_parser
from ds_tune.tuner.backend import Backend, backend_for, imagined_workload
from ds_tune.tuner.console import Console
from ds_tune.tuner.plan import hardware_asked_for, make_plan, print_plan
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.export import export
from ds_tune.tuner.space import Limits, study_space
from ds_tune.tuner.space_file import SpaceFile
from ds_tune.tuner.spec import DEFAULT_SAMPLER, DEFAULT_TRIAL_SECONDS, DEFAULTS, StudySpec, parse_memory, results_folder
from ds_tune.tuner.stopping import StopNow, StopSignals
from ds_tune.tuner.study import Study, quiet_optuna

PIPE_COLUMNS = 120
"""Where nobody says how wide a line may be."""

OUTPUT_ERRORS = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}

EXIT_FOUND, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def tune(arguments: argparse.Namespace) -> int:
    """Runs or resumes a study."""
    backend = backend_for(arguments)
    spec = make_spec(arguments, backend)
    # With --json, standard output belongs to the document alone.
    output = _output(stderr=arguments.json)
    console = Console(output, quiet=arguments.quiet)
    for line in backend.notes:
        console.say(line)
    spec, model = _with_cost_model(spec, console)
    resources = contextlib.ExitStack()
    objective, verification = backend.objectives(spec, console.say, resources)
    console.verifies = spec.verify and verification is not None
    interrupted = False
    stop = StopSignals(lambda: console.say("Stopping after this trial; Ctrl-C again stops now."))
    try:
        with stop, console, resources:
            Study(spec, objective, verification, console, stop, model).run()
        interrupted = stop.requested
    except StopNow:
        interrupted = True
    store = StudyStore.load(spec.storage_url, spec.study)
    summary = store.summary()
    written = export(summary, spec.results)
    console.finish(summary, written, _dashboard_command(arguments))
    if summary.state is not StudyState.UNFINISHED:
        store.set_more_pending(False)
    _print_document(arguments, summary)
    if interrupted and summary.goes_on:
        console.say("Interrupted; the same command goes on from here.")
        return EXIT_INTERRUPTED
    return _exit_status(summary, console)


def _with_cost_model(spec: StudySpec, console: Console) -> tuple[StudySpec, CostModel | None]:
    """The cost model that the search asks; a model whose sizes are not known is searched without one."""
    if spec.sampler != DEFAULT_SAMPLER:
        return spec, None
    try:
        return spec, CostModel(spec.workload, hardware_of(spec.machine))
    except UsageError as error:
        console.say(f"Searching without a cost model (--sampler tpe): {error}")
        return dataclasses.replace(spec, sampler="tpe"), None


def _output(*, stderr: bool = False) -> rich.console.Console:
    on_terminal = rich.console.Console(stderr=stderr).is_terminal
    known = on_terminal or "COLUMNS" in os.environ
    return rich.console.Console(stderr=stderr, width=None if known else PIPE_COLUMNS)


def _exit_status(summary: StudySummary, console: Console) -> int:
    if summary.state is StudyState.NOTHING_FITS:
        trials = f"none of {summary.finished_trials} trials did; --more M tries M more"
        console.say(f"Nothing fits: {summary.ended}." if summary.ended else f"Nothing has fitted so far: {trials}.")
        return EXIT_NOTHING_FITS
    return EXIT_FOUND


def make_spec(arguments: argparse.Namespace, backend: Backend) -> StudySpec:
    """
    Raises:
        UsageError: something asked for cannot be; nothing was run or written yet.
    """
    limits = Limits(
        ranks=backend.machine.ranks,
        max_micro_batch=arguments.max_micro_batch or backend.max_micro_batch,
        max_global_batch=arguments.max_global_batch or backend.max_global_batch,
        global_batch=arguments.global_batch,
    )
    if arguments.space is not None and backend.restricted_to is not None:
        raise UsageError("--space does not go with --replay, whose space is what was recorded; leave out one")
    check_metric(arguments.metric, backend.workload, backend.machine)
    preset, allowed = _preset(arguments)
    restricted_to = backend.restricted_to or _listed_space(
        arguments, limits, backend.workload, backend.machine, allowed
    )
    study_space(
        limits,
        preset=preset,
        allowed=allowed,
        workload=backend.workload,
        machine=backend.machine,
        restricted_to=restricted_to,
    )
    if arguments.storage is not None:
        check_storage_url(arguments.storage)
    results = results_folder(arguments.results)
    return StudySpec(
        study=arguments.study,
        storage_url=arguments.storage or results.storage_url,
        results=results,
        workload=backend.workload,
        machine=backend.machine,
        limits=limits,
        trials=arguments.trials,
        more=arguments.more,
        seed=arguments.seed,
        trial_seconds=float(arguments.trial_timeout or DEFAULT_TRIAL_SECONDS),
        preset=preset,
        allowed=allowed,
        sampler=arguments.sampler,
        metric=arguments.metric,
        verify=not arguments.no_verify,
        restricted_to=restricted_to,
        recording=backend.recording,
        versions=backend.versions,
    )


def _preset(arguments: argparse.Namespace) -> tuple[str, frozenset[str]]:
    """The preset, and the knobs allowed besides.

    Raises:
        UsageError: a knob is named that there is not, or that needs no allowance.
    """
    for word in arguments.allow:
        if word not in NUMERICS:
            raise UsageError(f"--allow {word}: what can be allowed is {', '.join(NUMERICS)}")
    return arguments.preset or "core", frozenset(word.removeprefix("numerics:") for word in arguments.allow)


def _listed_space(
    arguments: argparse.Namespace, limits: Limits, workload: Workload, machine: Machine, allowed: frozenset[str]
) -> Sequence[TrialConfig] | None:
    """The configurations of `--space FILE`; None without one.

    Raises:
        UsageError: the file is not to be understood, or describes nothing that could be tried.
    """
    if arguments.space is None:
        return None
    if arguments.preset is not None:
        raise UsageError("--space does not go with --preset: the file can name one itself; leave out one")
    limits.check()
    return SpaceFile.read(arguments.space).configurations(limits, knob_context_of(workload, machine), allowed)


def plan(arguments: argparse.Namespace) -> int:
    """Predicts, without running anything."""
    cap = parse_memory(arguments.memory_cap) if arguments.memory_cap else None
    hardware = hardware_asked_for(arguments, cap)
    model = CostModel(imagined_workload(arguments, hardware), hardware)
    defaults = DEFAULTS[hardware.device]
    limits = Limits(
        ranks=hardware.ranks,
        max_micro_batch=arguments.max_micro_batch or defaults.max_micro_batch,
        max_global_batch=arguments.max_global_batch or defaults.max_samples_per_rank * hardware.ranks,
        global_batch=arguments.global_batch,
    )
    preset, allowed = _preset(arguments)
    machine = machine_of(hardware)
    restricted_to = _listed_space(arguments, limits, model.workload, machine, allowed)
    space = study_space(
        limits, preset=preset, allowed=allowed, workload=model.workload, machine=machine, restricted_to=restricted_to
    )  # fmt: skip
    found = make_plan(model, space, best=arguments.best, each_accumulation=arguments.json)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    elif not arguments.quiet:
        print_plan(found, _output())
    return EXIT_FOUND if found.fitting else EXIT_NOTHING_FITS


def report(arguments: argparse.Namespace) -> int:
    """Prints a stored study."""
    summary = _load(arguments).summary()
    console = Console(_output(stderr=arguments.json), quiet=arguments.quiet)
    console.study_opened(summary, [])
    for count, record in enumerate(summary.records, start=1):
        # As it looked then: nothing was known yet of any loss.
        console.trial_finished(record, dataclasses.replace(summary, records=summary.records[:count], numerics={}))
    console.finish(summary, [], _dashboard_command(arguments))
    _print_document(arguments, summary)
    return _exit_status(summary, console)


def export_again(arguments: argparse.Namespace) -> int:
    """Writes a stored study's files."""
    store = _load(arguments)
    check_owner(ResultsFolder(arguments.out), store.study.study_name, _storage_url(arguments), option="--out")
    folder = results_folder(arguments.out, option="--out")
    for path in export(store.summary(), folder):
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


def _print_document(arguments: argparse.Namespace, summary: StudySummary) -> None:
    if arguments.json:
        print(json.dumps(study_document(summary), indent=2))


def _dashboard_command(arguments: argparse.Namespace) -> str:
    program = os.environ.get("DS_TUNE_PROGRAM", "ds-tune")
    where = ["--storage", masked(arguments.storage)] if arguments.storage else ["--results", str(arguments.results)]
    return shlex.join([program, "dashboard", *where])


COMMANDS = {
    "tune": (tune_parser, tune),
    "plan": (plan_parser, plan),
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
        arguments = make_parser().parse_args(words)
        with storage_faults(_storage_url(arguments)) if "storage" in arguments else contextlib.nullcontext():
            status = run(arguments)
        sys.stdout.flush()  # what cannot be written is said here, not by the interpreter in its last moment
        return status
    except DsTuneError as error:
        print(f"ds-tune: {error}", file=sys.stderr)
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
