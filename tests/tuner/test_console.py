"""What is printed fits into 80 columns and shows one figure a configuration."""

import dataclasses
import io
from collections.abc import Sequence

import pytest
import rich.console

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.tuner.console import Console, _Running, live_line, shortened, trial_heading, trial_line
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.time_left import RunsLeft

MACHINE = Machine(device="cuda", name="NVIDIA H200", ranks=2, memory_bytes=139 * GIB)
WORKLOAD = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
LONG = TrialConfig(
    zero_stage=1, micro_batch_size=16, gradient_accumulation_steps=12, activation_checkpointing=1, compile="blocks"
)


def measurement(rate: float, *, stopped_early: bool = False) -> Measurement:
    return Measurement(
        step_seconds=(64 / rate,) * 3, samples_per_second=rate, samples_per_second_ci95=(rate - 1, rate + 1),
        forward_seconds=0.1, backward_seconds=0.2, optimizer_seconds=0.1, deepspeed_samples_per_second=None,
        warmup_step_seconds=(1.0,), skipped_steps=0, peak_memory_bytes=100 * GIB, reserved_memory_bytes=100 * GIB,
        alloc_retries=0, setup_seconds=1.0, wall_seconds=8.0, model_parameters=10, flops_per_sample=1e13,
        stopped_early=stopped_early,
    )  # fmt: skip


def failure(kind: FailureKind) -> Failure:
    return Failure(
        kind=kind, message="rank 1 in forward: OutOfMemoryError: CUDA out of memory, and a long explanation of it",
        phase="forward", rank=1, peak_memory_bytes=138 * GIB, log_tail="", wall_seconds=3.0,
    )  # fmt: skip


OUTCOMES: list[Outcome] = [
    measurement(12345.67),
    measurement(3.0, stopped_early=True),
    *(failure(kind) for kind in FailureKind),
]


def study(outcomes: Sequence[Outcome], configs: Sequence[TrialConfig] = (), **changes: object) -> StudySummary:
    config = TrialConfig(zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1)
    configs = configs or [dataclasses.replace(config, micro_batch_size=1 + n) for n in range(len(outcomes))]
    records = [
        TrialRecord(
            number=number, config=config, outcome=outcome, source=Source.SEARCH if number else Source.BASELINE,
            started_at="2026-11-24T00:00:00+00:00", machine=MACHINE, versions={},
        )
        for number, (config, outcome) in enumerate(zip(configs, outcomes, strict=True))
    ]  # fmt: skip
    summary = StudySummary(
        study="s", workload=WORKLOAD, machine=MACHINE, versions={}, trials_total=9, tuning_seconds=60.0, ended=None,
        records=records,
    )  # fmt: skip
    return dataclasses.replace(summary, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("provenance", Provenance)
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_finished_trial_takes_one_line_of_80_columns(outcome: Outcome, provenance: Provenance) -> None:
    summary = study([outcome], [LONG], provenance=provenance)
    line = trial_line(summary.records[0], summary, 80).plain
    assert len(line) <= 80 and "\n" not in line
    assert "tmbspg16" in line and "z1_" in line
    if provenance is not Provenance.MEASURED:
        assert provenance.value in line
    assert len(trial_heading(provenance, 80).plain) <= 80


def test_reasons_are_as_long_as_there_is_room() -> None:
    summary = study([failure(FailureKind.OUT_OF_MEMORY)])
    [record] = summary.records
    assert trial_line(record, summary, 80).plain.endswith("  pruned: out of memory")
    full = "pruned: out of memory in forward (peak 138.00 of 139.00 GiB)"
    assert trial_line(record, summary, 140).plain.endswith(full)
    assert trial_line(record, summary, None).plain.endswith(full)


@pytest.mark.parametrize(
    ("name", "width", "shown"),
    [
        ("z1_gas2_tmbspg4", 25, "z1_gas2_tmbspg4"),
        ("z0_compile-blocks_pv64_gas9_tmbspg14", 25, "z0_co…_pv64_gas9_tmbspg14"),
        ("z0_compile-blocks_gas9_tmbspg14", 25, "z0_compile…_gas9_tmbspg14"),
        ("z0_ac1_compile-blocks_offload-cpu_gas9_tmbspg14", 25, "z0_ac1_compi…as9_tmbspg14"),
    ],
)
def test_long_names_keep_stage_and_batch_sizes(name: str, width: int, shown: str) -> None:
    assert shortened(name, width) == shown and len(shown) <= width


def test_the_live_line_is_one_line_with_the_time_left_at_its_end() -> None:
    running = _Running(LONG, "verification 4", RunsLeft(0, 4, 6), study([measurement(40.0)]))
    running.phase = "timed steps"
    for width in (40, 80, 120):
        line = live_line(running, running.started + 7, running.started - 60, width).plain
        assert len(line) <= width and line.endswith(" left")
    assert line.startswith("━━") and " verification 4  z1_" in line and "  7 s  timed steps  about 1 min" in line


def printed(summary: StudySummary, width: int = 80) -> str:
    output = io.StringIO()
    Console(rich.console.Console(file=output, width=width)).finish(Report.of(summary), [], "ds-tune dashboard")
    return output.getvalue()


def test_the_winner_is_marked_with_its_ties_and_has_one_figure() -> None:
    summary = study([measurement(rate) for rate in (20.0, 46.0, 44.0)])
    names = [record.config.name for record in summary.records]
    runs = {name: [measurement(rate)] * 2 for name, rate in zip(names, (21.0, 45.0, 44.9), strict=True)}
    text = printed(dataclasses.replace(summary, verification=runs, winner=names[2], tied=[names[1]]))
    rows = [line.split() for line in text.splitlines() if line.startswith(("  z0 ", "  global  "))]
    assert [row[-2:] for row in rows] == [[names[2], "★"]] * 2
    assert all("✓" in row and "44.90" in row for row in rows)
    assert "44.00" not in text and "46.00" not in text, "the search's figure is printed beside the verified one"
    # Beside the table, and not after other sentences.
    after = text[text.index("peak GiB a rank") :].splitlines()
    assert after[2].startswith(f"Level with {names[1]}: within 2%")


def test_the_total_time_is_said() -> None:
    summary = study([measurement(20.0)], verification={"z0_gas1_tmbspg1": [measurement(21.0)] * 2})
    for finals, words in (
        (50.0, "Tuning took 1 min 0 s, 1 trial; verification 16 s; comparing losses and ablations 34 s; "
         "1 min 50 s in all."),
        (0.0, "Tuning took 1 min 0 s, 1 trial; verification 16 s; 1 min 16 s in all."),
    ):  # fmt: skip
        assert words in printed(dataclasses.replace(summary, finals_seconds=finals), 200)


def test_trials_after_the_search_are_counted_apart() -> None:
    summary = study([measurement(20.0), measurement(30.0), measurement(29.0)])
    later = [*summary.records[:2], dataclasses.replace(summary.records[2], source=Source.ABLATION)]
    assert "Tuning took 1 min 0 s, 3 trials, 1 of them after the search." in printed(
        dataclasses.replace(summary, records=later), 200
    )


def test_interrupted_verification_marks_its_leader_so_far_and_compares_figures_of_one_kind() -> None:
    summary = study([measurement(rate) for rate in (20.0, 46.0, 44.0)], trials_total=3, finals_seconds=16.0)
    names = [record.config.name for record in summary.records]
    runs = {name: [measurement(rate)] for name, rate in ((names[1], 43.0), (names[2], 44.9))}
    text = printed(dataclasses.replace(summary, verification=runs))
    rows = [line.split() for line in text.splitlines() if line.startswith("  global  ")]
    assert [row[-2:] for row in rows] == [[names[2], "★"]]
    assert "★ best so far" in text and "★ winner" not in text
    [figures] = [line for line in text.splitlines() if line.startswith("  samples/s")]
    assert "samples/s in the search" in figures and "44.00" in figures and "20.00" in figures
    assert "Speed-up over the baseline: 2.20× in the search (95% interval" in text
    [tokens] = [line.split() for line in text.splitlines() if line.startswith("  tokens/s  ")]
    assert tokens[1:] == [f"{44 * 1024}", f"{20 * 1024}"]
    assert "Verification is incomplete: the same command goes on with it." in text


@pytest.mark.parametrize(
    ("verifies", "words"),
    [(True, "verification goes on."), (False, "verification is incomplete: the same command goes on with it.")],
)
def test_study_that_is_opened_again_in_its_verification_is_not_called_finished(verifies: bool, words: str) -> None:
    output = io.StringIO()
    console = Console(rich.console.Console(file=output, width=120))
    console.verifies = verifies
    console.study_opened(study([measurement(20.0)], trials_total=1, finals_seconds=0.0), [])
    assert f"Study s: the search is done (1 trial); {words}" in output.getvalue()
    assert "is finished" not in output.getvalue()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"trials_total": 9}, "★ best so far; all figures are measured."),
        ({}, "★ fastest of the search; all figures are measured."),
        ({"provenance": Provenance.SIMULATED}, "★ winner; all figures are simulated."),
    ],
    ids=["unfinished", "not verified", "simulated"],
)
def test_best_is_marked_for_what_it_is_where_nothing_was_verified(changes: dict[str, object], first: str) -> None:
    summary = study([measurement(20.0), measurement(30.0)])
    text = printed(dataclasses.replace(summary, **{"trials_total": len(summary.records), **changes}))
    assert "✓" not in text and "in all" not in text
    assert first in text
    [row] = [line for line in text.splitlines() if line.split()[:2] == ["global", "2"]]
    assert row.rstrip().endswith("z0_gas1_tmbspg2   ★")
