"""A comparison in Markdown, in the form of the page that DeepSpeed's autotuner published for GPT2-xl, and as rows."""

from collections.abc import Sequence

import tabulate

from ds_tune.objectives.machine import GIB, software_versions
from ds_tune.objectives.metric import METRICS, metric_context
from ds_tune.objectives.timing.intervals import is_answer
from ds_tune.storage.finalists import Speedup
from ds_tune.tuner.comparison.figures import Figures, RowFigures
from ds_tune.tuner.comparison.rows import Batch, Row, configuration_words
from ds_tune.tuner.comparison.runner import ModelComparison
from ds_tune.tuner.reports.markdown import closing_line, duration_words, stage_table
from ds_tune.tuner.reports.report import Report

HEADERS = (
    "", "configuration", "samples/s (95% interval)", "tokens/s", "MFU", "peak GiB", "global batch", "tuning",
    "experiments", "out of memory", "× vanilla", "× hand-tuned",
)  # fmt: skip

TERMINAL_COLUMNS = (
    ("row", 0), ("configuration", 1), ("samples/s", 2), ("× vanilla", 10), ("× hand-tuned", 11), ("GiB", 5),
    ("batch", 6), ("tuning", 7),
)  # fmt: skip
"""Headings of a terminal's table, which has less room, and where in `figure_cells` each column is."""

NOT_RUNNABLE = "Not runnable"
NOTHING = "–"


def comparison_markdown(figures: Figures) -> str:
    """The whole report."""
    sections = ["# Comparison\n"]
    if not figures.is_complete:
        sections.append("Not complete: the same command goes on with it.\n")
    sections.append(_environment(figures))
    for batch in figures.request.batches:
        sections += [
            f"## Throughput comparison, {_batch_title(batch)}\n",
            f"Samples per second. {_batch_words(figures, batch)}\n",
            throughput_table(figures, batch),
            "".join(f"\n- {line}" for line in reason_lines(figures, batch)),
            "",
        ]
    sections.append("## Every figure\n")
    for each in figures.models:
        for batch in figures.request.batches:
            title = f"{each.model}, {_batch_title(batch)}"
            if batch is Batch.ONE and each.one_batch is not None:
                title += f" of {each.one_batch}"
            sections += [f"### {title}\n", figures_table(figures.of(each.model, batch)), ""]
            sections += [f"{line}\n" for line in busy_lines(figures.of(each.model, batch))]
    sections += ["## Detailed ds-tune result summary\n"]
    for each in figures.models:
        for row in figures.of_studies(each.model):
            sections += _study(each, row)
    sections += ["## How this was measured\n", _method(figures)]
    return "\n".join(sections) + "\n"


def throughput_table(figures: Figures, batch: Batch) -> str:
    """The seed's first table: a line a model, a column a row."""
    lines = []
    for each in figures.models:
        cells = [_cell(row) for row in figures.of(each.model, batch)]
        lines.append([each.model, *cells])
    headers = ["Model name", *(row.words for row in figures.request.rows)]
    return tabulate.tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)


def _cell(row: RowFigures) -> str:
    """A figure with what it was reached by, as the seed writes it."""
    if row.config is None:
        return NOT_RUNNABLE if row.is_runnable is False else NOTHING
    config = row.config
    rate = "not verified" if row.rate is None else f"{row.rate.samples_per_second:.3f}"
    knobs = "".join(f", {field} = {value}" for field, value in config.knobs_on.items())
    sizes = f"gas = {config.gradient_accumulation_steps}, mbs = {config.micro_batch_size}{knobs}"
    return f"{rate} ({sizes})" if row.row is Row.VANILLA else f"Zero{config.zero_stage} ({rate}, {sizes})"


def reason_lines(figures: Figures, batch: Batch) -> list[str]:
    """Why rows have no figure."""
    return [
        f"{row.model}, {row.row.words}: {row.reason}."
        for each in figures.models
        for row in figures.of(each.model, batch)
        if row.reason is not None
    ]


def figures_table(rows: Sequence[RowFigures]) -> str:
    """Every figure of one table of a model, in Markdown."""
    return tabulate.tabulate(
        [figure_cells(row) for row in rows], headers=HEADERS, tablefmt="pipe", disable_numparse=True
    )


def figure_cells(row: RowFigures) -> list[str]:
    """Every figure of a row as words, in the order of `HEADERS`."""
    tokens, mfu = METRICS["tokens_per_second"], METRICS["mfu"]
    search = row.search
    name = configuration_words(row.row, row.config) if row.config else _cell(row)
    tuned = duration_words(search.seconds) if search.experiments else NOTHING
    if search.total_seconds >= search.seconds + 1:
        tuned += f" (verified {duration_words(search.total_seconds)})"
    return [
        row.row.words,
        name,
        NOTHING if row.rate is None else _interval(row.rate.samples_per_second, row.rate.samples_per_second_ci95),
        tokens.words(row.metrics.get(tokens.name)),
        mfu.words(row.metrics.get(mfu.name)),
        NOTHING if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / GIB:.2f}",
        NOTHING if row.global_batch is None else str(row.global_batch),
        tuned,
        str(search.experiments),
        str(search.out_of_memory),
        speedup_words(row.over_vanilla, is_itself=row.row is Row.VANILLA),
        speedup_words(row.over_hand_tuned, is_itself=row.row is Row.HAND_TUNED),
    ]


def _interval(rate: float, ci95: tuple[float, float]) -> str:
    return f"{rate:.2f} ({ci95[0]:.2f}–{ci95[1]:.2f})" if is_answer(ci95) else f"about {rate:.3g}"


def speedup_words(speedup: Speedup | None, *, is_itself: bool = False) -> str:
    """A speed-up with its interval; where that spans too much, a bound is all that is known."""
    if speedup is None:
        return NOTHING
    if is_itself:
        return "1"
    low, high = speedup.ci95
    factor = f"{speedup.factor:.2f}" if speedup.settled else "too noisy"
    return f"{factor} ({low:.2f}–{high:.2f})"


def busy_lines(rows: Sequence[RowFigures]) -> list[str]:
    """Says so where something else used the machine."""
    disturbances = [row.disturbance for row in rows if row.disturbance is not None]
    if not disturbances:
        return []
    return [
        f"Something else used the machine: steps of one configuration differ by {max(disturbances):.0%}. Figures are "
        "of the least disturbed steps of each configuration; run it again when nothing else uses the machine."
    ]


def _batch_title(batch: Batch) -> str:
    return "free global batch" if batch is Batch.FREE else "one global batch"


def _batch_words(figures: Figures, batch: Batch) -> str:
    if batch is Batch.FREE:
        return "Each row has the global batch that its search chose: larger ones are faster, and not the same training."
    sizes = [f"{each.model} {each.one_batch or 'not known yet'}" for each in figures.models]
    return f"All rows of a model train on as many samples a step: {', '.join(sizes)}."


def _environment(figures: Figures) -> str:
    lines = [f"- training: {each.workload.description}" for each in figures.models]
    lines.append(f"- hardware: {figures.models[0].machine.description}")
    lines += [f"- {name} ({version})" for name, version in software_versions().items()]
    return "## Environment\n\n" + "\n".join(lines) + "\n"


def _study(of: ModelComparison, row: RowFigures) -> list[str]:
    """The seed's second table, of one study: what was tried at each ZeRO stage."""
    summary = of.study(row.row, row.batch)
    if summary is None:
        return []
    improvement = "Inf" if row.rate is not None else "not known"
    if row.over_vanilla is not None:
        improvement = speedup_words(row.over_vanilla)
    return [
        f"### {of.model}, {row.row.words}, {_batch_title(row.batch)}\n",
        f"- Tuning time: {duration_words(summary.tuning_seconds)}",
        f"- Number of experiments: {row.search.experiments}",
        f"- Throughput improvement over baseline: {improvement}\n",
        stage_table(Report.of(summary), marked=True),
        f"\n{closing_line(summary)}\n",
    ]


def _method(figures: Figures) -> str:
    first = figures.models[0]
    source = metric_context(first.workload, first.machine, flops_per_sample=1.0).peak_source
    peak = f" MFU is a share of {source}." if source else ""
    rounds = figures.request.rounds
    return (
        f"- `{Row.VANILLA.words}` trains without DeepSpeed: torch's DistributedDataParallel over the ranks, AdamW, "
        "autocast, in fp16 with a GradScaler. mbs starts at 1 and doubles until memory is out; the fastest is kept.\n"
        f"- `{Row.HAND_TUNED.words}` doubles mbs in the same way at each ZeRO stage that trains, all else DeepSpeed's "
        "default; the fastest is kept. gas is 1, and at one global batch what is left of it.\n"
        f"- `{Row.CORE.words}` searches ZeRO stage, mbs and gas, `{Row.SPEED.words}` also what usually pays; their "
        "winners train as untuned training does where the studies compared losses.\n"
        f"- Every row's choice runs {rounds} times in fresh processes, interleaved, the order turned from round to "
        "round; rows that chose the same configuration share its runs. Throughput is end to end: ranks × mbs × gas "
        "over the mean seconds of whole optimizer steps on the slowest rank, data loading included. Intervals allow "
        "for what two runs of one configuration differ by. A configuration that fails there is replaced by the next "
        "best of its search.\n"
        "- Tuning time is that of the search; `verified` adds the study's own verification, comparison of losses and "
        f"ablations. Runs that both tables of a model use count in both.{peak}"
    )
