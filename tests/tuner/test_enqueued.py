"""Trials that a person enqueued through Optuna on a finished study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

SURFACE = Path(__file__).parents[2] / "benchmarks/data/1xH200.gpt2-xl.jsonl"
WORDS = ["--replay", str(SURFACE), "--no-verify"]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"zero_stage": 1}, "without all parameters, runs as z1_"),
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 1}, "without all parameters, runs as z"),
        ({"zero_stage": 7}, "is left out: zero_stage=7 is not in the space of this study."),
        ({"zero_stage": "1"}, "is left out: zero_stage='1' is not in the space of this study."),
        ({"stage": 1}, "is left out: this study has no parameter stage, but zero_stage, "),
        (
            {"zero_stage": 1, "micro_batch_size": 63, "gradient_accumulation_steps": 1},
            "is left out: no configuration of this study has zero_stage=1, micro_batch_size=63",
        ),
    ],
)
def test_an_enqueued_trial_runs_completed_or_is_left_out_with_a_reason(
    command: Callable[..., Any], tmp_path: Path, params: dict[str, Any], said: str
) -> None:
    assert command(*WORDS, "--trials", "2").returncode == 0
    url = f"sqlite:///{next(tmp_path.glob('*/*.db'))}"
    optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url).enqueue_trial(params)
    finished = command(*WORDS, "--more", "1")
    assert finished.returncode == 0, finished.stderr
    assert f"trial 2, which was enqueued by hand{',' if 'left' in said else ''} {said}" in finished.stdout
    study = optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url)
    assert len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED])) == 3
    assert ("reason" in study.trials[2].user_attrs) == ("left out" in said)
