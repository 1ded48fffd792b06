"""summary.md: the form of the tables that DeepSpeed publishes for its autotuner (docs of GPT2-xl)."""

import dataclasses
import re
from collections.abc import Callable

import pytest

from ds_tune.objectives.trial import Measurement, Provenance
from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.markdown import duration_words, rate_words, summary_markdown
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.reports.verdict import improvement_words

MakeRecord = Callable[..., TrialRecord]
MakeSummary = Callable[..., StudySummary]


def section(document: str, title: str) -> str:
    return document.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_summary_markdown_has_the_published_sections_in_their_order(finished: StudySummary) -> None:
    titles = [line for line in summary_markdown(Report.of(finished)).splitlines() if line.startswith("#")]
    assert titles == [
        "# gpt2-xl",
        "## Environment",
        "## Throughput",
        "## Detailed result summary",
        "## Trials",
        "## Why",
        "## How this was measured",
    ]


def test_the_throughput_of_samples_of_many_lengths_is_said_in_tokens(finished: StudySummary) -> None:
    facts = ScriptFacts(
        loop="Trainer", ds_config={}, zero_stage=1, micro_batch_size=1, gradient_accumulation_steps=1, dtype="fp16",
        parameters=10, trainable_parameters=10, model=None, samples_per_micro_batch=1, tokens_per_sample=None,
        loader_follows=False, mean_tokens_per_sample=812.4, shortest_sample=213, longest_sample=2048,
        padding_share=0.24,
    )  # fmt: skip
    start = ScriptStart(
        program="/train.py", is_module=False, arguments=(), local_rank_flag=None, environment={}, folder="/",
        launcher=(),
    )  # fmt: skip
    summary = dataclasses.replace(finished, workload=ScriptWorkload(start=start, facts=facts))
    assert summary.best is not None
    tokens = f"{812.4 * summary.rate(summary.best):.0f}"
    text = section(summary_markdown(Report.of(summary)), "Throughput")
    assert (
        f"The best trains {tokens} tokens/s: 812 tokens a sample (213–2048 seen), 24% of what is computed is padding; "
        "tokens, padding apart, are what is counted.\n"
    ) in text
    assert ["tokens/s", tokens] == [rows(text)[-4][0], rows(text)[-4][2]]
    assert "tokens, padding apart" not in summary_markdown(Report.of(finished))


def test_the_environment_names_the_training_the_hardware_and_all_versions(finished: StudySummary) -> None:
    environment = section(summary_markdown(Report.of(finished)), "Environment")
    assert "gpt2-xl fp16, sequence length 1024, synthetic tokens" in environment
    assert "2 × NVIDIA H200 (140.0 GiB), capped at 24.00 GiB a rank" in environment
    for package, version in finished.versions.items():
        assert f"- {package} ({version})\n" in environment


def test_the_baseline_stands_beside_the_best_with_what_each_trains_on_a_step(finished: StudySummary) -> None:
    _, _, baseline, best = rows(section(summary_markdown(Report.of(finished)), "Throughput"))[:4]
    assert baseline[0:2] == ["baseline", "z0_gas1_tmbspg1"] and baseline[3:] == ["–", "2", "23.00"]
    assert best[0:2] == ["ds-tune", "z1_gas2_tmbspg8"] and best[3:] == ["–", "32", "20.50"]
    assert best[2].startswith("58.25 ± ")


def test_the_summary_has_the_published_three_lines_the_stages_and_the_closing_line(finished: StudySummary) -> None:
    text = section(summary_markdown(Report.of(finished)), "Detailed result summary")
    assert "- Tuning time: 20 min 55 s\n" in text
    assert "- Number of experiments: 5\n" in text
    assert "- Throughput improvement over baseline: 2.12× (95% interval " in text
    assert [row[0] for row in rows(text)[2:]] == ["z0", "z1", "z2", "z3", "global"]
    assert "Tuning completed in 0:20:55.156000. Total number of experiments: 5." in text


def test_every_trial_is_listed_with_how_it_ended(finished: StudySummary) -> None:
    header, _, *trials = rows(section(summary_markdown(Report.of(finished)), "Trials"))
    assert [trial[1] for trial in trials] == [record.config.name for record in finished.records]
    assert all(len(trial) == len(header) for trial in trials)
    assert [trial[-2] for trial in trials] == ["complete", "complete", "complete", "pruned", "failed"]
    assert [trial[-1] for trial in trials] == [
        "baseline",
        "★ fastest of the search",
        "search",
        "out of memory in forward (peak 24.00 of 24.00 GiB)",
        "crash: rank 0 / was killed by SIGSEGV",
    ]


def test_deepspeeds_own_figures_are_named_as_such(finished: StudySummary) -> None:
    text = section(summary_markdown(Report.of(finished)), "How this was measured")
    assert "end to end" in text and "95% confidence interval" in text
    # Its three timers see 7/8 of each step.
    assert f"as DeepSpeed's autotuner counts: {58.25 / 0.875:.2f} samples/s" in text
    assert f"by DeepSpeed's ThroughputTimer: {58.25 * 1.1:.2f} samples/s" in text


def test_a_baseline_that_does_not_run_makes_the_improvement_infinite(
    make_record: MakeRecord, make_summary: MakeSummary
) -> None:
    records = [make_record("z0_gas1_tmbspg1", source=Source.BASELINE), make_record("z1_gas1_tmbspg1", 27.497)]
    text = summary_markdown(Report.of(make_summary(records)))
    assert "- Throughput improvement over baseline: Inf (the baseline does not run)\n" in text
    assert rows(section(text, "Throughput"))[2][:2] == ["baseline", "not runnable"]


def test_a_study_where_nothing_fits_says_why_it_ended(nothing_fits: StudySummary) -> None:
    text = summary_markdown(Report.of(nothing_fits))
    assert "- Throughput improvement over baseline: none: no configuration ran\n" in text
    assert "- Ended early: not even one sample a rank fits, in any ZeRO stage\n" in text
    assert [row[1] for row in rows(section(text, "Throughput"))[2:]] == ["not runnable", "not runnable"]


def test_an_unfinished_study_says_how_far_it_is(finished: StudySummary, make_summary: MakeSummary) -> None:
    assert "- Not finished: 4 of 9 trials\n" in summary_markdown(Report.of(make_summary(finished.records, total=9)))


def test_nothing_faster_than_the_baseline_is_said(make_record: MakeRecord, make_summary: MakeSummary) -> None:
    summary = make_summary([make_record("z0_gas1_tmbspg1", 30.0, source=Source.BASELINE)])
    assert improvement_words(summary) == "1.00× (nothing tried was faster than the baseline)"


def with_intervals(summary: StudySummary, factor: float) -> StudySummary:
    """The study with the intervals of its measurements as wide as this factor to either side."""
    records = [
        dataclasses.replace(
            record,
            outcome=dataclasses.replace(
                record.outcome,
                samples_per_second_ci95=(record.samples_per_second / factor, record.samples_per_second * factor),
            ),
        )
        if isinstance(record.outcome, Measurement) and record.samples_per_second
        else record
        for record in summary.records
    ]
    return dataclasses.replace(summary, records=records)


def test_speedup_that_is_no_answer_is_given_as_a_bound(make_record: MakeRecord, make_summary: MakeSummary) -> None:
    records = [
        make_record("z0_gas1_tmbspg1", 10.0, source=Source.BASELINE),
        make_record("z1_gas1_tmbspg4", 30.0, number=1),
    ]
    noisy = with_intervals(make_summary(records), 1.5)
    assert improvement_words(noisy) == "at least 1.69 times (95% interval 1.69–5.32)"
    assert study_document(Report.of(noisy))["speedup"]["settled"] is False
    assert improvement_words(with_intervals(noisy, 2.5)) == "too noisy to tell (95% interval 0.82–10.96)"
    settled = study_document(Report.of(with_intervals(noisy, 1.01)))["speedup"]
    assert (settled["factor"], settled["settled"]) == (pytest.approx(3.0), True)


def test_a_trial_without_a_rate_has_a_dash(make_record: MakeRecord) -> None:
    assert rate_words(make_record("z0_gas1_tmbspg1")) == "–"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (41.4, "41 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (3720, "1 h 2 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration_words(seconds) == words


@pytest.mark.parametrize("provenance", [Provenance.SIMULATED, Provenance.REPLAYED])
def test_figures_that_were_not_measured_carry_the_word_and_are_not_verified(
    finished: StudySummary, provenance: Provenance
) -> None:
    text = summary_markdown(Report.of(dataclasses.replace(finished, provenance=provenance)))
    assert text.startswith(f"# gpt2-xl, {provenance.value}\n\nAll figures are **{provenance.value}**: ")
    header, _, *_ = rows(section(text, "Throughput"))
    rate, peak = f"samples/s, {provenance.value}", f"peak GiB a rank, {provenance.value}"
    assert header == ["", "configuration", rate, "global batch", peak]
    assert rate in rows(section(text, "Trials"))[0]
    bullets = section(text, "Detailed result summary")
    assert f"- Tuning time: 20 min 55 s (the trials' own time: 1 min 15 s, {provenance.value})\n" in bullets
    assert re.search(rf"over baseline: 2\.12× \(95% interval .*\), {provenance.value}\n", bullets)
    assert f"experiments: 5. All figures are {provenance.value}." in bullets
    assert "verif" not in text.lower()


def test_a_measured_report_has_no_such_word(finished: StudySummary) -> None:
    text = summary_markdown(Report.of(finished))
    assert not any(word in text for word in ("measured**", "simulated", "replayed"))


def test_checkpointing_has_a_column_where_a_trial_has_it(finished: StudySummary) -> None:
    assert "ckpt" not in rows(section(summary_markdown(Report.of(finished)), "Trials"))[0]
    config = dataclasses.replace(finished.records[1].config, activation_checkpointing=2)
    records = [finished.records[0], dataclasses.replace(finished.records[1], config=config)]
    header, _, first, second = rows(
        section(summary_markdown(Report.of(dataclasses.replace(finished, records=records))), "Trials")
    )
    column = header.index("ckpt")
    assert (first[column], second[column], second[1]) == ("0", "2", "z1_ac2_gas2_tmbspg8")
