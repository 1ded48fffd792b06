"""Terminal output: a line a finished trial, a live line below, and the tables at the end."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.console
import rich.live
import rich.table
import rich.text

from ds_tune.objectives.machine import GIB
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, Provenance, TrialConfig
from ds_tune.objectives.words import counted
from ds_tune.storage.records import StudySummary, TrialRecord, TrialState
from ds_tune.tuner.arguments import in_options
from ds_tune.tuner.dimensions import DIMENSIONS
from ds_tune.tuner.reports.markdown import (
    duration_words,
    figure_words,
    numerics_words,
    rate_words,
    total_words,
    verified_words,
)
from ds_tune.tuner.reports.metrics import metric_line, metric_rows
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.reports.verdict import (
    SYMBOLS,
    after_search_words,
    first_words,
    improvement_words,
    legend_words,
    standing_words,
    untuned_words,
    verdict_lines,
)
from ds_tune.tuner.time_left import RunsLeft

_STYLES = {TrialState.COMPLETE: "green", TrialState.PRUNED: "yellow", TrialState.FAILED: "red"}

NARROW_COLUMNS, NARROW_NAME, WIDE_NAME = 100, 25, 36
"""How wide a terminal counts as narrow, and the columns that a configuration's name then has, or otherwise."""
RATE_WIDTH, PEAK_WIDTH = 16, 9

SHORTEST_WORD = 3
"""Length of the shortest abbreviated word of a name, its ellipsis included."""

BAR_WIDTH = 6

# The live line counts seconds; drawing it more often would only take time from the CPU ranks.
REFRESHES_PER_SECOND = 1


class Console:
    """Shows a study's progress; see `tuner.study.Observer`.

    On a terminal the last line is alive; elsewhere each line is plain and final. Nothing is shown when quiet.
    """

    verifies = False
    """Whether runs follow on the search, for the time that is left."""

    def __init__(self, output: rich.console.Console, *, quiet: bool = False) -> None:
        self._output = output
        self._quiet = quiet
        self._live: rich.live.Live | None = None
        self._running: _Running | None = None
        self._opened = time.monotonic()
        self._has_heading = False
        # Where nobody reads it at once, nothing is abbreviated.
        self._columns = output.width if output.is_terminal or "COLUMNS" in os.environ else None

    def say(self, text: str, *, whole: bool = False) -> None:
        """One line for the person, wrapped between words on a terminal unless it is to be copied whole."""
        if self._quiet:
            return
        text = in_options(text)
        if whole or self._columns is None:
            self._output.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self._output.print(text, highlight=False, markup=False, overflow="ignore", crop=False)

    def __enter__(self) -> "Console":
        if self._output.is_terminal and not self._quiet:
            self._live = rich.live.Live(
                get_renderable=self._live_line,
                console=self._output,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._running = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def study_opened(self, summary: StudySummary, again: Sequence[str]) -> None:
        self.say(summary.provenance.mark(f"{summary.workload.description} on {summary.machine.description}"))
        done = summary.finished_trials
        why = f", {summary.ended}" if summary.ended else ""
        if (words := after_search_words(summary, goes_on=self.verifies)) is not None:
            self.say(f"Study {summary.study}: the search is done ({counted(done, 'trial')}{why}); {words}.")
        elif summary.is_searched:
            self.say(f"Study {summary.study} is finished ({counted(done, 'trial')}{why}); `more=M` adds M trials.")
        elif done:
            self.say(f"Study {summary.study} goes on: {done} of {summary.trials_total} trials are done.")
        for name in again:
            self.say(f"{name} was interrupted and runs again.")

    def trial_started(self, number: int, config: TrialConfig, summary: StudySummary) -> None:
        title = f"trial {summary.finished_trials + 1}/{summary.trials_total}"
        left = max(summary.trials_total - summary.finished_trials, 1)
        self._running = _Running(config, title, RunsLeft.of_trials(left, finals=self.verifies), summary)
        if self._live is None:
            self.say(f"{title}: {config.name} …")

    def phase(self, phase: str) -> None:
        if self._running is not None:
            self._running.phase = phase

    def trial_finished(self, record: TrialRecord, summary: StudySummary) -> None:
        self._running = None
        if self._quiet:
            return
        if not self._has_heading:
            self._has_heading = True
            self._output.print(trial_heading(summary.provenance, self._columns), soft_wrap=True)
        self._output.print(trial_line(record, summary, self._columns), soft_wrap=True)

    def verification_started(self, record: TrialRecord, summary: StudySummary, left: RunsLeft) -> None:
        runs = sum(map(len, summary.verification.values()))
        self._running = _Running(record.config, f"verification {runs + 1}", left, summary)

    def verification_finished(self, record: TrialRecord, outcome: Outcome) -> None:
        self._running = None
        if isinstance(outcome, Measurement):
            self.say(f"     {record.config.name} again, in fresh processes: {outcome.samples_per_second:.2f} samples/s")
        else:
            self.say(f"     {record.config.name} again, in fresh processes: {outcome.kind.value.replace('_', ' ')}")

    def numerics_started(
        self, record: TrialRecord, compared: TrialConfig, summary: StudySummary, left: RunsLeft
    ) -> None:
        self._running = _Running(compared, "comparing losses", left, summary)

    def numerics_finished(self, record: TrialRecord, found: NumericsCheck | str) -> None:
        self._running = None
        if isinstance(found, NumericsCheck) and found.fault is not None:
            self.say(f"     {numerics_words(record.config.name, found)}")

    def ablation_started(self, winner: TrialRecord, config: TrialConfig, summary: StudySummary, left: RunsLeft) -> None:
        self._running = _Running(config, "ablation", left, summary)

    def finalist_added(self, record: TrialRecord, summary: StudySummary) -> None:
        self.trial_finished(record, summary)
        self.say(f"     {record.config.name}, the winner with one setting changed back, is faster: it is verified, too")

    def _live_line(self) -> rich.text.Text:
        if self._running is None:
            return rich.text.Text("starting the training processes …", style="dim")
        return live_line(self._running, time.monotonic(), self._opened, self._output.width)

    def finish(self, report: Report, written: Sequence[Path], dashboard: str, launch: str | None = None) -> None:
        """The closing tables: the stages, the best configuration, and where everything is.

        Args:
            dashboard: the line that shows the trials.
            launch: the line that trains with the winner.
        """
        if self._quiet:
            return
        summary = report.summary
        self._output.print()
        self._output.print(stage_table(report, self._columns))
        best = summary.best
        if best is not None:
            self.say(f"{legend_words(summary)}\n")
            self._output.print(best_table(summary, self._columns))
            for line in verdict_lines(summary):
                self.say(line)
            self.say(metric_line(summary))
            self.say(f"Speed-up over the baseline: {improvement_words(summary)}")
            if (words := untuned_words(summary)) is not None:
                self.say(f"Over untuned training: {words}")
            self._say_batch_difference(summary)
        for name, found in summary.numerics.items():
            self.say(numerics_words(name, found))
        for line in report.explanation:
            self.say(line)
        if summary.ended is not None and summary.best is not None:
            self.say(f"Stopped after {summary.finished_trials} of {summary.trials_total} trials: {summary.ended}.")
        for line in forecast_lines(report):
            self.say(line)
        self.say(total_words(summary))
        if best is not None:
            for line in (*summary.workload.by_hand(best.config), *summary.workload.in_code(best.config)):
                self.say(line)
        if written:
            self.say("Written:")
            for path in written:
                self.say(f"  {path}", whole=True)
        self.say(f"Browse the trials:  {dashboard}", whole=True)
        if launch is not None:
            edits = summary.best is not None and summary.workload.by_hand(summary.best.config)
            self.say(f"Train with it{', when that is written' if edits else ''}:  {launch}", whole=True)

    def _say_batch_difference(self, summary: StudySummary) -> None:
        """Says so where the best is faster with a larger batch, which is not the same training."""
        best, baseline = summary.best, summary.baseline
        if best is None or baseline is None:
            return
        batches = [record.config.global_batch_size(record.machine.ranks) for record in (best, baseline)]
        if batches[0] != batches[1]:
            self.say(
                f"Its global batch is {batches[0]} samples, the baseline's {batches[1]}; "
                "`global_batch=B` searches at one batch size."
            )


def forecast_lines(report: Report) -> list[str]:
    """How wrong the cost model was, and what it kept from being launched."""
    lines = []
    if (errors := report.forecast_errors) is not None:
        of = "one forecast" if errors.trials == 1 else f"medians of {errors.trials} forecasts"
        lines.append(
            f"Forecasts were off by {errors.rate_median:.0%} in samples/s and {errors.memory_median:.1%} in peak "
            f"memory ({of})."
        )
    if count := sum(each.configurations for each in report.summary.excluded):
        words = counted(count, "configuration")
        lines.append(f"Certain to need more memory, so not launched: {words} (see summary.md).")
    return lines


class _Running:
    """Contents of the live line: a run, and how much comes after it."""

    def __init__(self, config: TrialConfig, title: str, left: RunsLeft, summary: StudySummary) -> None:
        self.config = config
        self.title = title
        self.phase = "start"
        self.started = time.monotonic()
        self._left = left
        self._trial_seconds = [record.outcome.wall_seconds for record in summary.records]
        self._fresh_seconds = [run.wall_seconds for runs in summary.verification.values() for run in runs]

    def seconds_left(self, elapsed: float) -> float:
        return self._left.seconds(elapsed, self._trial_seconds, self._fresh_seconds)


def live_line(running: _Running, now: float, opened: float, width: int) -> rich.text.Text:
    """A bar, the run and its phase, and the time left, in one line of a terminal.

    Args:
        now, opened: seconds on one clock; the bar shows how much of the time from `opened` on has passed.
    """
    elapsed = now - running.started
    left = running.seconds_left(elapsed)
    filled = round(BAR_WIDTH * (now - opened) / (now - opened + left))
    end = f"  about {duration_words(left)} left"
    line = rich.text.Text.assemble(
        ("━" * filled, "cyan"),
        ("─" * (BAR_WIDTH - filled), "dim"),
        (f" {running.title}  ", "bold"),
        (shortened(running.config.name, NARROW_NAME), "cyan"),
        f"  {duration_words(elapsed)}  {running.phase}",
        no_wrap=True,
        overflow="ellipsis",
    )
    line.truncate(max(width - len(end), BAR_WIDTH), overflow="ellipsis")
    line.append(end, style="dim")
    return line


def shortened(name: str, width: int) -> str:
    """A name in as many columns at most: its longest words abbreviated, or where that is not enough its middle left
    out. ZeRO stage and batch sizes stand at its ends."""
    words = name.split("_")
    while len("_".join(words)) > width:
        longest = max(range(1, len(words) - 2), key=lambda index: len(words[index]), default=None)
        if longest is None or len(words[longest]) <= SHORTEST_WORD:
            head = (width - 1) // 2
            return f"{name[:head]}…{name[head + 1 - width :]}"
        words[longest] = f"{words[longest].removesuffix('…')[:-1]}…"
    return "_".join(words)


def trial_heading(provenance: Provenance, width: int | None) -> rich.text.Text:
    """The headings of the lines of finished trials."""
    name = _name_width(width)
    rate = provenance.mark("samples/s")
    return rich.text.Text(
        f"{'#':<4}{'configuration':<{name + RATE_WIDTH - len(rate)}}{rate}{'peak GiB':>{PEAK_WIDTH}}  state",
        style="bold",
    )


def trial_line(record: TrialRecord, summary: StudySummary, width: int | None) -> rich.text.Text:
    """Number, name, samples/s ± CI, peak GiB, state and reason; as much of the reason as the line has room for."""
    columns = _name_width(width)
    name = record.config.name if width is None else shortened(record.config.name, columns)
    peak = record.outcome.peak_memory_bytes
    memory = "–" if peak is None else f"{peak / GIB:.2f}"
    line = rich.text.Text.assemble(
        (f"{f'#{record.number}':<3} ", "bold"),
        (f"{name:<{columns}}", "cyan"),
        f"{rate_words(record):>{RATE_WIDTH}}{memory:>{PEAK_WIDTH}}  ",
    )
    state = summary.provenance.mark(record.state.value)
    if record.reason is not None:
        endings = [f"{state}: {in_options(record.reason)}", f"{state}: {short_reason(record)}"]
        endings.append(summary.provenance.mark(short_reason(record)))
    elif summary.fastest is not None and summary.fastest.number == record.number:
        endings = [f"{state}  ★ best so far", f"{state} ★"]
    else:
        endings = [state]
    room = math.inf if width is None else width - len(line)
    line.append(next((words for words in endings if len(words) <= room), endings[-1]), style=_STYLES[record.state])
    return line


def short_reason(record: TrialRecord) -> str:
    """Why a trial is not complete, in a word or two."""
    if not isinstance(record.outcome, Failure):
        return "too slow"
    return (
        "refused" if record.outcome.kind is FailureKind.INVALID_CONFIG else record.outcome.kind.value.replace("_", " ")
    )


def _name_width(width: int | None) -> int:
    return WIDE_NAME if width is None or width >= NARROW_COLUMNS else NARROW_NAME


def stage_table(report: Report, width: int | None) -> rich.table.Table:
    """DeepSpeed's table of tuning spaces, with the winner marked."""
    summary = report.summary
    title = summary.provenance.mark("Best by ZeRO stage")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("trials", justify="right", no_wrap=True)
    table.add_column("samples/s", justify="right", no_wrap=True)
    table.add_column("peak GiB", justify="right", no_wrap=True)
    table.add_column("configuration", no_wrap=True)
    table.add_column("", no_wrap=True)
    for space, count, best in report.stages:
        if best is None:
            table.add_row(space, str(count), "–", "–", "none ran", "")
        else:
            memory = f"{(best.outcome.peak_memory_bytes or 0) / GIB:.2f}"
            standing = SYMBOLS.get(standing_words(best, summary), "")
            style = "bold green" if best is summary.best else None
            name = best.config.name if width is None else shortened(best.config.name, _name_width(width))
            table.add_row(space, str(count), figure_words(best, summary), memory, name, standing, style=style)
    return table


def best_table(summary: StudySummary, width: int | None) -> rich.table.Table:
    """The best configuration beside the baseline, a column each."""
    columns = [(first_words(summary), summary.best), ("baseline", summary.baseline)]
    shown = [(title, record) for title, record in columns if record is not None]
    mark = summary.provenance.mark
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=mark("Best configuration"), title_justify="left")
    table.add_column("", no_wrap=True)
    for title, _ in shown:
        table.add_column(title, justify="right", overflow="fold")
    names = [record.config.name for _, record in shown]
    table.add_row(
        "name",
        *(each.replace("_gas", "_\ngas") if width and len(each) > _name_width(width) else each for each in names),
    )
    if all(summary.verified(record) for _, record in shown):
        table.add_row("samples/s verified", *(verified_words(record, summary) for _, record in shown))
    else:
        # A verified figure stands beside none of the search.
        title = "samples/s in the search" if summary.verification else mark("samples/s")
        table.add_row(title, *(rate_words(record) for _, record in shown))
    for row in metric_rows([record for _, record in shown], summary):
        table.add_row(*row)
    for dimension in DIMENSIONS:
        values = [getattr(record.config, dimension.field) for _, record in shown]
        if any(value != dimension.off for value in values):
            table.add_row(dimension.field, *map(str, values))
    table.add_row("global batch", *(str(record.config.global_batch_size(record.machine.ranks)) for _, record in shown))
    table.add_row(
        mark("peak GiB a rank"), *(f"{(record.outcome.peak_memory_bytes or 0) / GIB:.2f}" for _, record in shown)
    )
    return table
