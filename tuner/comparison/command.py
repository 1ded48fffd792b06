"""The command's work: opens the comparison, runs what is left, writes and shows what was found."""

import contextlib
import enum
import json
from collections.abc import Iterator
from pathlib import Path

import rich.box
import rich.table

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.machine import detect_machine
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.lock import StudyLock
from ds_tune.tuner.backend import DEFAULTS
from ds_tune.tuner.comparison.document import comparison_csv, comparison_document
from ds_tune.tuner.comparison.figures import Figures, figures_of
from ds_tune.tuner.comparison.ledger import Ledger
from ds_tune.tuner.comparison.request import CompareRequest
from ds_tune.tuner.comparison.rows import Batch
from ds_tune.tuner.comparison.runner import ModelComparison, Runner
from ds_tune.tuner.comparison.tables import (
    TERMINAL_COLUMNS,
    busy_lines,
    comparison_markdown,
    figure_cells,
    reason_lines,
)
from ds_tune.tuner.console import Console
from ds_tune.tuner.observer import Observer
from ds_tune.tuner.output import output
from ds_tune.tuner.stopping import StopNow, StopSignals


class ComparisonFolder:
    """Files of a comparison in its results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = root / "runs.json"
        self.markdown = root / "comparison.md"
        self.csv = root / "comparison.csv"
        self.document = root / "comparison.json"

    def prepare(self) -> None:
        """
        Raises:
            UsageError: it cannot be written to, or holds a study's results.
        """
        if ResultsFolder(self.root).owner.exists():
            raise UsageError(
                f"`results={self.root}` holds the results of a study; give the comparison a folder of its own"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"`results={self.root}` cannot be written to ({error.strerror}); name another folder"
            ) from error

    def write(self, figures: Figures) -> list[Path]:
        """Writes what is known; the files, the best to read first."""
        write_atomically(self.markdown, comparison_markdown(figures))
        write_atomically(self.csv, comparison_csv(figures))
        write_atomically(self.document, json.dumps(comparison_document(figures), indent=2) + "\n")
        return [self.markdown, self.csv, self.document]


class Ending(enum.Enum):
    """How a comparison's run ended."""

    COMPLETE = enum.auto()
    NOTHING_RUNS = enum.auto()
    """Complete, and no row trains anything."""
    INTERRUPTED = enum.auto()
    LEFT_OUT = enum.auto()
    """Something could not be had, and its reason was said; the same command tries it again."""


def run_comparison(request: CompareRequest, *, quiet: bool, as_json: bool) -> Ending:
    """Runs or resumes a comparison.

    Raises:
        UsageError, EnvironmentFault: it cannot be done as asked.
    """
    printed = output(stderr=as_json)
    console = Console(printed, quiet=quiet)
    folder = ComparisonFolder(request.request.results)
    if not request.models:
        # What is here decides the default, as for a study.
        machine = detect_machine(gpus=request.request.gpus, cpu_ranks=1, memory_cap_bytes=None)
        request = request.of_models((DEFAULTS[machine.device].model,))
    first = request.backend_of(request.models[0], console.say)
    folder.prepare()
    with StudyLock(f"sqlite:///{folder.ledger.resolve()}", "comparison"):
        ledger = Ledger(folder.ledger, request.asked(first))
        models = [ModelComparison(model, request, ledger, console.say) for model in request.models]
        console.say(f"{', '.join(request.models)} on {first.machine.description}")

        def write() -> list[Path]:
            return folder.write(figures_of(request, models))

        @contextlib.contextmanager
        def observer() -> Iterator[Observer]:
            shown = Console(printed, quiet=quiet)
            shown.verifies = request.request.verify
            with shown:
                yield shown

        stop = StopSignals(lambda: console.say("Stopping after this run; Ctrl-C again stops now."))
        with contextlib.suppress(StopNow), stop:
            for model in models:
                Runner(model, observer, console.say, stop, write).run()
        figures = figures_of(request, models)
        written = folder.write(figures)
    if not quiet:
        _show(figures, console, printed.print)
        console.say("Written:")
        for path in written:
            console.say(f"  {path}", whole=True)
    if as_json:
        print(json.dumps(comparison_document(figures), indent=2))
    if figures.is_complete:
        return Ending.COMPLETE if any(row.rate for row in figures.rows) else Ending.NOTHING_RUNS
    if stop.requested:
        console.say("Interrupted; the same command goes on from here.")
        return Ending.INTERRUPTED
    console.say("Not complete; the same command tries the rest again.")
    return Ending.LEFT_OUT


def _show(figures: Figures, console: Console, show: object) -> None:
    """Every table on the terminal."""
    assert callable(show)
    for each in figures.models:
        for batch in figures.request.batches:
            rows = figures.of(each.model, batch)
            at = "free global batch" if batch is Batch.FREE else f"global batch {each.one_batch or 'not known yet'}"
            table = rich.table.Table(title=f"{each.model}, {at}", title_justify="left", box=rich.box.SIMPLE_HEAD)
            for heading, _ in TERMINAL_COLUMNS:
                table.add_column(heading, overflow="fold")
            for row in rows:
                cells = figure_cells(row)
                table.add_row(row.row.value.replace("_", "-"), *(cells[index] for _, index in TERMINAL_COLUMNS[1:]))
            show(table)
            for line in busy_lines(rows):
                console.say(line)
    for batch in figures.request.batches:
        for line in reason_lines(figures, batch):
            console.say(line)
