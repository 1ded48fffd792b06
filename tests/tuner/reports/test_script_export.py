"""What is exported of a script whose settings are in its code: nothing that would train without them."""

import dataclasses
import subprocess
from pathlib import Path

from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload
from ds_tune.objectives.workload.script_facts import TRAINER, ScriptFacts
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import StudySummary
from ds_tune.tuner.reports.export import export
from ds_tune.tuner.reports.report import Report


def test_a_line_that_needs_edits_first_says_them_and_trains_nothing(finished: StudySummary, tmp_path: Path) -> None:
    facts = ScriptFacts(
        loop=TRAINER, ds_config={}, zero_stage=1, micro_batch_size=1, gradient_accumulation_steps=1, dtype="fp16",
        parameters=10, trainable_parameters=10, model=None, samples_per_micro_batch=1, tokens_per_sample=None,
        loader_follows=False, initialized_at="train.py:13",
    )  # fmt: skip
    start = ScriptStart(
        program="/train.py", is_module=False, arguments=(), local_rank_flag=None, environment={}, folder="/",
        launcher=(),
    )  # fmt: skip
    summary = dataclasses.replace(finished, workload=ScriptWorkload(start=start, facts=facts))
    assert summary.best is not None
    best = summary.best.config
    folder = ResultsFolder(tmp_path)
    export(Report.of(summary), folder)
    sentence = (
        'Write TrainingArguments(deepspeed="ds_config_optimal.json", '
        f"per_device_train_batch_size={best.micro_batch_size}, "
        f"gradient_accumulation_steps={best.gradient_accumulation_steps})."
    )
    assert f"# {sentence}\n" in folder.optimal_command.read_text()
    run = subprocess.run(["sh", str(folder.optimal_command)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"First: {sentence} Then remove this line.\n"
