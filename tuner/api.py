"""`tune`: a study from a Python program, as `ds-tune` runs one from the command line."""

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what it needs takes half a second to import, and is not needed to import it
    from ds_tune.storage.records import StudySummary
    from ds_tune.tuner.observer import Observer


def tune(
    *,
    observer: "Observer | None" = None,
    verbose: bool = False,
    handle_signals: bool = False,
    **fields: Any,
) -> "StudySummary":
    """Finds the fastest DeepSpeed configuration for a model on this machine by training with it.

    The same call again resumes an interrupted study. Ranks run in processes of their own that import nothing of the
    calling script, so that it needs no `if __name__ == "__main__"`.

    Args:
        observer: told how the study goes; without one, and unless verbose, nothing is printed.
        verbose: show what the command line shows.
        handle_signals: stop as the command line does, which takes the main thread: the first Ctrl-C finishes the trial
            and returns what there is, the second ends at once. Otherwise Ctrl-C is an ordinary KeyboardInterrupt.
        fields: those of `TuneRequest`, which are the command's options; paths may be strings.

    Returns:
        What the study found: `best`, `baseline`, `speedup` and all of its `records`. The result files are written.

    Raises:
        UsageError: what was asked for cannot be done; the message names the fields.
        EnvironmentFault: the machine or its software cannot do it.
        KeyboardInterrupt: the study was interrupted, and the same call goes on from there.
    """
    from ds_tune.objectives.errors import UsageError
    from ds_tune.objectives.words import shown
    from ds_tune.storage.database import storage_faults
    from ds_tune.storage.records import StudyState
    from ds_tune.storage.study_store import StudyStore
    from ds_tune.tuner.arguments import dashboard_command
    from ds_tune.tuner.backends import backend_for
    from ds_tune.tuner.console import Console
    from ds_tune.tuner.observer import SilentObserver, check_observer
    from ds_tune.tuner.output import output
    from ds_tune.tuner.reports.export import export, launch_line
    from ds_tune.tuner.reports.report import Report
    from ds_tune.tuner.request import request_of
    from ds_tune.tuner.spec import make_spec
    from ds_tune.tuner.stopping import StopNow, StopSignals
    from ds_tune.tuner.study import optuna_silenced, run_study

    request = request_of(fields)
    check_observer(observer)
    for name, value in (("verbose", verbose), ("handle_signals", handle_signals)):
        if not isinstance(value, bool):
            raise UsageError(f"`{name}` must be True or False (got {shown(value)})")
    console = Console(output(), quiet=not verbose)
    told = observer or (console if verbose else SilentObserver())
    spec = make_spec(request, backend_for(request, told.say))
    console.verifies = request.verify and spec.backend.verifies
    stop = StopSignals(lambda: told.say("Stopping after this trial; Ctrl-C again stops now."))
    with optuna_silenced(), storage_faults(spec.storage_url):
        try:
            with stop if handle_signals else contextlib.nullcontext(), console:
                run_study(spec, told, stop)
        except StopNow as now:
            raise KeyboardInterrupt(str(now)) from None
        store = StudyStore.load(spec.storage_url, request.study)
        summary = store.summary()
        report = Report.of(summary)
        written = export(report, spec.results)
        browse = dashboard_command(request.storage, request.results)
        console.finish(report, written, browse, launch_line(summary, spec.results))
        if summary.state is not StudyState.UNFINISHED:
            store.set_more_pending(False)
    return summary
