"""Warm ranks: every knob twice in the same four processes, and what DeepSpeed keeps in them."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import KNOBS, Measurement, Outcome, TrialConfig, has_meaning
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

pytestmark = pytest.mark.slow

FAULTS = Path(__file__).parents[2] / "faults"
ONE_STEP = StepPlan(warmup_steps=1, zero3_extra_warmup_steps=0, min_timed_steps=2, max_timed_steps=2)
FOUR = Machine(device="cpu", name="the test machine", ranks=4, memory_bytes=4 * GIB)
ONE_BLOCK = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 257}
CONTEXT = KnobContext(device="cpu", ranks=4, vocabulary=257, dtype="fp32", model_type="gpt2")


def every_knob() -> Iterator[TrialConfig]:
    """Each knob at its first value that has a meaning on CPU ranks, at the highest such stage; and every stage."""
    for stage in range(4):
        yield TrialConfig(zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=1)
    for field, knob in KNOBS.items():
        for value, stage in ((value, stage) for value in knob.values for stage in (3, 2, 1, 0)):
            named: dict[str, Any] = {"zero_stage": stage, field: value}
            if has_meaning(field, {**{name: each.off for name, each in KNOBS.items()}, **named}, CONTEXT):
                yield TrialConfig(**named, micro_batch_size=1, gradient_accumulation_steps=2)
                break


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of them: two rounds, one after the other."""

    configs: list[TrialConfig]
    outcomes: list[Outcome]
    notices: list[str]
    changed: list[list[dict[str, list[str | None]]]]
    """Variables of DeepSpeed that a rank found changed after each trial, with their values before the first and now."""


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ranks")
    configs, notices = list(every_knob()), list[str]()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(ONE_BLOCK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAULTS), prepend=":")
        patch.setenv("WATCHED_FOLDER", str(folder))
        with LocalLauncher(FOUR, worker="watched_rank") as launcher:
            tuned = DeepSpeedObjective(
                HuggingFaceWorkload(model=str(folder / "model"), seq_len=16, dtype="fp32"),
                FOUR,
                launcher=launcher,
                log_folder=folder,
                trial_seconds=120,
                plan=ONE_STEP,
                notice=notices.append,
            )
            outcomes = []
            for config in [*configs, *configs]:
                trial = folder / config.name
                trial.mkdir(exist_ok=True)
                outcomes.append(tuned.run(config, trial, lambda phase: None))
            tuned.close()
    changed = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]
    return Run(configs, outcomes, notices, changed)


def test_every_knob_runs_twice_in_the_same_four_processes(two_rounds: Run) -> None:
    assert any(config.parameter_group for config in two_rounds.configs)
    for config, outcome in zip([*two_rounds.configs] * 2, two_rounds.outcomes, strict=True):
        assert isinstance(outcome, Measurement), (config.name, outcome)
    assert two_rounds.notices == [], "the ranks were replaced"


HARMLESS: set[str] = {
    "deepspeed.utils.groups._WORLD_GROUP",  # of all ranks, as every engine's
    "deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS",  # Muon is added where it is first asked for
}


def test_deepspeed_keeps_nothing_of_an_engine_that_the_next_one_reads(two_rounds: Run) -> None:
    assert len(two_rounds.changed) == 4
    for trials in two_rounds.changed:
        assert len(trials) >= len(two_rounds.outcomes) - 1  # the last is told when nobody waits for it any more
        kept = {name: values for trial in trials for name, values in trial.items() if name not in HARMLESS}
        assert kept == {}
