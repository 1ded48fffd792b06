"""Rows of a comparison, from runs that were written by hand: figures, reasons, and every form that they are told in."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import FailureKind
from ds_tune.tuner.comparison.document import comparison_csv, comparison_document
from ds_tune.tuner.comparison.figures import Figures, RowFigures, figures_of
from ds_tune.tuner.comparison.rows import Batch, Row
from ds_tune.tuner.comparison.runner import ModelComparison
from ds_tune.tuner.comparison.tables import comparison_markdown

from .conftest import config, failed, ran

SCHEMA = json.loads((Path(__file__).parents[3] / "tuner" / "comparison" / "comparison.schema.json").read_text())
Make = Callable[..., ModelComparison]
Write = Callable[..., None]

VANILLA = {config(0, 1): ran(config(0, 1), 10), config(0, 2): ran(config(0, 2), 12), config(0, 4): failed()}
BY_HAND = {config(stage, 1): failed() for stage in (0, 3)} | {
    config(1, 1): ran(config(1, 1), 11),
    config(1, 2): failed(),
    config(2, 1): ran(config(2, 1), 15),
    config(2, 2): failed(),
}


def of_row(figures: Figures, row: Row, batch: Batch = Batch.FREE) -> RowFigures:
    [found] = [each for each in figures.rows if (each.row, each.batch) == (row, batch)]
    return found


def validated(figures: Figures) -> dict[str, Any]:
    document = json.loads(json.dumps(comparison_document(figures)))
    jsonschema.validate(document, SCHEMA)
    return document


def verify(of: ModelComparison, rates: dict[str, float]) -> None:
    """Two rounds in fresh processes."""
    for key, choice in of.choices().items():
        for turn in range(2):
            of.ledger.add_verified(of.model, key, turn, ran(choice.config, rates[key]))


def test_row_has_its_verified_figure_and_what_its_search_took(comparison: Make, sweep: Write) -> None:
    of = comparison(rounds=2)
    sweep(of, Row.VANILLA, VANILLA)
    sweep(of, Row.HAND_TUNED, BY_HAND)
    verify(of, {"vanilla/z0_gas1_tmbspg2": 12.0, "deepspeed/z2_gas1_tmbspg1": 15.0})
    figures = figures_of(of.request, [of])
    validated(figures)
    by_hand = of_row(figures, Row.HAND_TUNED)
    assert (by_hand.config, by_hand.global_batch, by_hand.reason) == (config(2, 1), 2, None)
    assert by_hand.rate is not None and by_hand.rate.samples_per_second == pytest.approx(15.0, rel=1e-3)
    assert by_hand.metrics["tokens_per_second"] == pytest.approx(15.0 * 32, rel=1e-3)
    assert (by_hand.search.seconds, by_hand.search.experiments, by_hand.search.out_of_memory) == (60.0, 6, 4)
    assert by_hand.peak_memory_bytes == GIB
    assert by_hand.over_vanilla is not None
    assert by_hand.over_vanilla.factor == pytest.approx(1.25, rel=1e-3)
    low, high = by_hand.over_vanilla.ci95
    assert 1.2 < low < 1.25 < high < 1.3
    assert of_row(figures, Row.CORE).reason == "not searched yet"
    assert not figures.is_complete


def test_vanilla_that_runs_out_of_memory_at_once_is_not_runnable_and_the_others_have_no_ratio_to_it(
    comparison: Make, sweep: Write
) -> None:
    of = comparison()
    sweep(of, Row.VANILLA, {config(0, 1): failed()})
    sweep(of, Row.HAND_TUNED, BY_HAND)
    verify(of, {"deepspeed/z2_gas1_tmbspg1": 18.0})
    figures = figures_of(of.request, [of])
    vanilla = of_row(figures, Row.VANILLA)
    assert (vanilla.is_runnable, vanilla.reason) == (False, "out of memory at mbs 1")
    assert of_row(figures, Row.HAND_TUNED).over_vanilla is None
    text = comparison_markdown(figures)
    assert "| gpt2-nano    | Not runnable" in text
    assert "Zero2 (18.0" in text and "gas = 1, mbs = 1)" in text
    assert "- gpt2-nano, baseline (vanilla HF): out of memory at mbs 1." in text


def test_crash_is_told_as_the_reason(comparison: Make, sweep: Write) -> None:
    of = comparison()
    sweep(of, Row.VANILLA, {config(0, 1): failed(FailureKind.CRASH, "rank 1 was killed by SIGSEGV")})
    assert of_row(figures_of(of.request, [of]), Row.VANILLA).reason == "crash: rank 1 was killed by SIGSEGV"


def test_choice_that_fails_in_fresh_processes_is_replaced_by_the_next_best(comparison: Make, sweep: Write) -> None:
    of = comparison()
    sweep(of, Row.VANILLA, VANILLA)
    of.ledger.add_verified(of.model, "vanilla/z0_gas1_tmbspg2", 0, failed())
    choice = of.choice(Row.VANILLA, Batch.FREE)
    assert choice is not None and choice.config == config(0, 1)
    of.ledger.add_verified(of.model, "vanilla/z0_gas1_tmbspg1", 0, failed())
    assert of_row(figures_of(of.request, [of]), Row.VANILLA).reason == "in fresh processes: out of memory"


def test_own_configuration_is_a_row_of_the_table_at_its_own_batch_only(
    comparison: Make, sweep: Write, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}))
    of = comparison(ds_config=file, free_only=False, global_batch=8)
    assert of.next_of_sweep(Row.OWN, Batch.FREE) == config(1, 2)
    assert of.next_of_sweep(Row.VANILLA, Batch.FREE) == config(0, 1)  # whose batch the own file does not hold
    assert of.next_of_sweep(Row.VANILLA, Batch.ONE) == config(0, 1, 4)
    sweep(of, Row.OWN, {config(1, 2): ran(config(1, 2), 9)})
    figures = figures_of(of.request, [of])
    assert of_row(figures, Row.OWN).config == config(1, 2)
    assert of_row(figures, Row.OWN, Batch.ONE).reason == "its global batch is 4"


def test_rounds_are_interleaved_and_every_other_is_turned(comparison: Make, sweep: Write) -> None:
    of = comparison(rounds=2)
    sweep(of, Row.VANILLA, VANILLA)
    sweep(of, Row.HAND_TUNED, BY_HAND)
    order = []
    while (turn := of.next_verification()) is not None:
        number, choice = turn
        order.append((number, choice.row))
        of.ledger.add_verified(of.model, choice.key, number, ran(choice.config, 10))
    by_hand, vanilla = Row.HAND_TUNED, Row.VANILLA
    assert order == [(0, vanilla), (0, by_hand), (1, by_hand), (1, vanilla)]


def test_runs_on_file_are_there_for_the_next_session_and_for_no_other_comparison(
    comparison: Make, sweep: Write
) -> None:
    sweep(comparison(), Row.VANILLA, VANILLA)
    again = comparison(rounds=5, models=("gpt2-nano", "gpt2"))  # more may be asked for
    assert again.known(Row.VANILLA)[config(0, 4).name] == failed()
    with pytest.raises(UsageError, match=r"holds another comparison .*seq_len 32 there, 64 here"):
        comparison(seq_len=64)


def test_csv_has_a_line_a_row_with_the_figures_of_the_document(comparison: Make, sweep: Write) -> None:
    of = comparison(rounds=2)
    sweep(of, Row.VANILLA, VANILLA)
    verify(of, {"vanilla/z0_gas1_tmbspg2": 12.0})
    figures = figures_of(of.request, [of])
    lines = list(csv.DictReader(io.StringIO(comparison_csv(figures))))
    rows = validated(figures)["rows"]
    assert [line["row"] for line in lines] == [row["row"] for row in rows] == ["vanilla", "hand_tuned", "core", "speed"]
    assert float(lines[0]["samples_per_second"]) == rows[0]["samples_per_second"]
    assert float(lines[0]["over_vanilla"]) == 1.0
    assert (lines[0]["micro_batch_size"], lines[1]["micro_batch_size"]) == ("2", "")


def test_study_that_could_not_go_on_is_told_with_its_reason_and_is_tried_again(comparison: Make) -> None:
    comparison().ledger.set_fault("gpt2-nano", Row.CORE, Batch.FREE, "the last 3 trials failed")
    of = comparison()
    core = of_row(figures_of(of.request, [of]), Row.CORE)
    assert (core.is_runnable, core.reason) == (None, "the last 3 trials failed")
    assert not of.is_searched(Row.CORE, Batch.FREE)
