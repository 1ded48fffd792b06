"""What a person sees: a line a finished trial, a live line below, and the tables at the end."""

import time
from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from objectives.machine import GIB
from objectives.numerics import NumericsCheck
from objectives.trial import Figures, Measurement, Outcome, TrialConfig
from storage.explanation import explanation_lines
from storage.forecasts import forecast_errors
from storage.markdown import (
    duration_words,
    improvement_words,
    numerics_words,
    rate_words,
    tuning_words,
    verdict_lines,
    verified_words,
)
from storage.records import StudySummary, TrialRecord, TrialState
from tuner.space import DIMENSIONS

_STYLES = {TrialState.COMPLETE: "green", TrialState.PRUNED: "yellow", TrialState.FAILED: "red"}

# The live line counts seconds; drawing it more often would only take time from the CPU ranks.
REFRESHES_PER_SECOND = 1


class Console:
    """Shows a study's progress; see `tuner.study.Observer`.

    On a terminal the last line is alive; elsewhere each line is plain and final. Nothing is shown when quiet.
    """

    def __init__(self, output: rich.console.Console, *, quiet: bool = False) -> None:
        self._output = output
        self._quiet = quiet
        self._live: rich.live.Live | None = None
        self._running: _RunningTrial | None = None

    def say(self, text: str) -> None:
        """One line for the person."""
        if not self._quiet:
            self._output.print(text, highlight=False, markup=False, soft_wrap=True)

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
        self.say(summary.figures.mark(f"{summary.workload.description} on {summary.machine.description}"))
        done = summary.finished_trials
        if done >= summary.trials_total or summary.ended:
            why = f", {summary.ended}" if summary.ended else ""
            self.say(f"Study {summary.study} is finished ({done} trials{why}); --more M adds M trials.")
        elif done:
            self.say(f"Study {summary.study} goes on: {done} of {summary.trials_total} trials are done.")
        for name in again:
            self.say(f"{name} was interrupted and runs again.")

    def trial_started(self, number: int, config: TrialConfig, summary: StudySummary) -> None:
        self._running = _RunningTrial(config, summary)
        if self._live is None:
            self.say(f"{self._running.title}: {config.name} …")

    def phase(self, phase: str) -> None:
        if self._running is not None:
            self._running.phase = phase

    def trial_finished(self, record: TrialRecord, summary: StudySummary) -> None:
        self._running = None
        if self._quiet:
            return
        self._output.print(trial_line(record, summary), soft_wrap=True)

    def verification_started(self, record: TrialRecord, summary: StudySummary) -> None:
        self._running = _RunningTrial(record.config, summary)
        runs = len(summary.verification.get(record.config.name, ()))
        self._running.title = f"verification, run {runs + 1} of"

    def verification_finished(self, record: TrialRecord, outcome: Outcome) -> None:
        self._running = None
        if isinstance(outcome, Measurement):
            self.say(f"     {record.config.name} again, in fresh processes: {outcome.samples_per_second:.2f} samples/s")
        else:
            self.say(f"     {record.config.name} again, in fresh processes: {outcome.kind.value.replace('_', ' ')}")

    def numerics_started(self, record: TrialRecord, compared: TrialConfig, summary: StudySummary) -> None:
        self._running = _RunningTrial(compared, summary)
        self._running.title = f"losses of {record.config.name}, compared:"

    def numerics_finished(self, record: TrialRecord, found: NumericsCheck | str) -> None:
        self._running = None
        if isinstance(found, NumericsCheck) and found.fault is not None:
            self.say(f"     {numerics_words(record.config.name, found)}")

    def ablation_started(self, winner: TrialRecord, config: TrialConfig, summary: StudySummary) -> None:
        self._running = _RunningTrial(config, summary)
        self._running.title = f"why {winner.config.name} is fast:"

    def finalist_added(self, record: TrialRecord) -> None:
        self.say(f"     {record.config.name} is faster with one setting changed back: it is verified, too")

    def _live_line(self) -> rich.text.Text:
        running = self._running
        if running is None:
            return rich.text.Text("starting the training processes …", style="dim")
        return rich.text.Text.assemble(
            ("▶ ", "cyan"),
            (f"{running.title}  ", "bold"),
            (running.config.name, "cyan"),
            f"  {running.phase}  {duration_words(time.monotonic() - running.started)}",
            (running.remaining(), "dim"),
        )

    def finish(self, summary: StudySummary, written: Sequence[Path], dashboard: str) -> None:
        """The closing tables: the stages, the best configuration, and where everything is."""
        if self._quiet:
            return
        self._output.print()
        self._output.print(stage_table(summary))
        best = summary.best
        if best is not None:
            self._output.print(best_table(summary))
            self.say(f"Speed-up over the baseline: {improvement_words(summary)}")
            for line in verdict_lines(summary):
                self.say(line)
            self._say_batch_difference(summary)
        for name, found in summary.numerics.items():
            self.say(numerics_words(name, found))
        for line in explanation_lines(summary):
            self.say(line)
        if summary.ended is not None and summary.best is not None:
            self.say(f"Stopped after {summary.finished_trials} of {summary.trials_total} trials: {summary.ended}.")
        for line in forecast_lines(summary):
            self.say(line)
        verified = f"; verification {duration_words(seconds)}" if (seconds := summary.verification_seconds) else ""
        self.say(f"Tuning took {tuning_words(summary)}, {len(summary.records)} experiments{verified}.")
        if written:
            self.say("Written:")
            for path in written:
                self.say(f"  {path}")
        self.say(f"Browse the trials:  {dashboard}")

    def _say_batch_difference(self, summary: StudySummary) -> None:
        """Says so where the best is faster with a larger batch, which is not the same training."""
        best, baseline = summary.best, summary.baseline
        if best is None or baseline is None:
            return
        batches = [record.config.global_batch_size(record.machine.ranks) for record in (best, baseline)]
        if batches[0] != batches[1]:
            self.say(
                f"Its global batch is {batches[0]} samples, the baseline's {batches[1]}; "
                "--global-batch B searches at one batch size."
            )


def forecast_lines(summary: StudySummary) -> list[str]:
    """How wrong the cost model was, and what it kept from being launched."""
    lines = []
    if (errors := forecast_errors(summary)) is not None:
        lines.append(
            f"Forecasts were off by {errors.rate_median:.0%} in samples/s and {errors.memory_median:.1%} in peak "
            f"memory (medians of {errors.trials} trials)."
        )
    if count := sum(each.configurations for each in summary.excluded):
        lines.append(f"Not launched, as they certainly need more memory: {count} configurations (see summary.md).")
    return lines


class _RunningTrial:
    """What the live line shows."""

    def __init__(self, config: TrialConfig, summary: StudySummary) -> None:
        self.config = config
        self.phase = "start"
        self.started = time.monotonic()
        self.title = f"trial {summary.finished_trials + 1}/{summary.trials_total}"
        self._left = summary.trials_total - summary.finished_trials
        self._seconds = [record.outcome.wall_seconds for record in summary.records]

    def remaining(self) -> str:
        """An estimate from the trials so far; nothing before there are two."""
        if len(self._seconds) < 2 or self._left < 1:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        left = self._left * mean - (time.monotonic() - self.started)
        return f"  about {duration_words(max(left, mean / 2))} left"


def trial_line(record: TrialRecord, summary: StudySummary) -> rich.text.Text:
    """Number, name, samples/s ± CI, peak GiB, state and reason, best so far."""
    peak = record.outcome.peak_memory_bytes
    memory = f"{peak / GIB:.2f} GiB" if peak is not None else "–"
    line = rich.text.Text.assemble(
        (f"#{record.number:<3}", "bold"),
        (f"{record.config.name:<22} ", "cyan"),
    )
    if isinstance(record.outcome, Measurement):
        line.append(f"{rate_words(record):>15} samples/s")
        line.append(f"{memory:>12}  ")
        line.append(summary.figures.mark(record.state.value), style=_STYLES[record.state])
    else:
        line.append(f"{summary.figures.mark(record.state.value):>8}", style=_STYLES[record.state])
    if record.reason is not None:
        line.append(f"  {record.reason}")
    best = summary.best
    if best is not None and record.state is not TrialState.PRUNED:
        mark = (
            "  ★ best so far"
            if best.number == record.number
            else f"  best {best.samples_per_second:.2f} {best.config.name}"
        )
        line.append(mark, style="dim")
    return line


def stage_table(summary: StudySummary) -> rich.table.Table:
    """DeepSpeed's table of tuning spaces."""
    mark = summary.figures.mark
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=mark("Best by ZeRO stage"), title_justify="left")
    table.add_column("tuning space", no_wrap=True)
    table.add_column("experiments", justify="right", no_wrap=True)
    table.add_column(mark("samples/s"), justify="right", no_wrap=True)
    table.add_column("peak GiB", justify="right", no_wrap=True)
    table.add_column("configuration", overflow="fold")
    rows = [(f"z{stage}", count, best) for stage, (count, best) in summary.best_of_stage().items()]
    for space, count, best in [*rows, ("global", len(summary.records), summary.best)]:
        if best is None:
            table.add_row(space, str(count), "–", "–", "none ran")
        else:
            peak = best.outcome.peak_memory_bytes or 0
            style = "bold green" if space == "global" else None
            table.add_row(space, str(count), rate_words(best), f"{peak / GIB:.2f}", best.config.name, style=style)
    return table


def best_table(summary: StudySummary) -> rich.table.Table:
    """The best configuration beside the baseline, a column each."""
    columns = [("best", summary.best), ("baseline", summary.baseline)]
    shown = [(title, record) for title, record in columns if record is not None]
    mark = summary.figures.mark
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=mark("Best configuration"), title_justify="left")
    table.add_column("", no_wrap=True)
    for title, _ in shown:
        table.add_column(title, justify="right", overflow="fold")
    table.add_row("name", *(record.config.name for _, record in shown))
    rate = "samples/s in the search" if summary.figures is Figures.MEASURED else mark("samples/s")
    table.add_row(rate, *(rate_words(record) for _, record in shown))
    if any(summary.verified(record) for _, record in shown):
        table.add_row("samples/s verified", *(verified_words(record, summary) for _, record in shown))
    for dimension in DIMENSIONS:
        values = [getattr(record.config, dimension.field) for _, record in shown]
        if any(value != dimension.off for value in values):
            table.add_row(dimension.field, *map(str, values))
    table.add_row("global batch", *(str(record.config.global_batch_size(record.machine.ranks)) for _, record in shown))
    table.add_row(
        mark("peak GiB a rank"), *(f"{(record.outcome.peak_memory_bytes or 0) / GIB:.2f}" for _, record in shown)
    )
    return table
