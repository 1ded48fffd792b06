"""The file for transformers' Trainer: what was found, "auto" kept, and the arguments that go with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.objectives.workload.trainer_file import TRAINER_FILE, trainer_file, trainer_words

SCRIPT = Path(__file__).parents[2] / "scripts" / "trainer.py"
FOUND = TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=2)

SMALL = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
OPEN: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 2, **SMALL},
}  # fmt: skip
STATED: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-4, "betas": [0.8, 0.99], "eps": "auto", "weight_decay": 0.1, "torch_adam": True},
    },
    "zero_optimization": {"stage": 2, **SMALL},
}

PROGRAM = """
import json, runpy, sys
from accelerate.state import AcceleratorState
from ds_tune.objectives.rank.distributed import skip_unused_ops
skip_unused_ops()
for words in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(True)
    sys.argv = ["trainer.py", *words]
    print("RUN", flush=True)
    runpy.run_path(SCRIPT, run_name="__main__")
"""


def workload(document: dict[str, Any], dtype: str = "fp32") -> HuggingFaceWorkload:
    return HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype=dtype, base_ds_config=document)


def learning_rates(runs: list[list[str]], folder: Path) -> list[list[float]]:
    """Learning rates of the Trainer's steps, for each of these runs of the script on one rank."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1", "OMP_NUM_THREADS": "2", "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    common = ["--output_dir", "out", "--max_steps", "4", "--logging_steps", "1", "--save_strategy", "no",
              "--report_to", "none", "--samples", "64", "--use_cpu", "True", "--disable_tqdm", "True"]  # fmt: skip
    program = PROGRAM.replace("SCRIPT", repr(str(SCRIPT)))
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, json.dumps([[*common, *run] for run in runs])],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        [float(rate) for rate in re.findall(r"'learning_rate': '?([\d.e-]+)", each)]
        for each in done.stdout.split("RUN")[1:]
    ]


@pytest.mark.slow
def test_trainer_trains_with_it_as_with_the_person_s_own_file(tmp_path: Path) -> None:
    """Learning rate and warm-up are those of the own file, and transformers finds no value that is another."""
    rate = ["--learning_rate", "3e-4", "--warmup_steps", "2"]
    runs = []
    for number, (document, own_words) in enumerate(
        [(OPEN, [*rate, "--per_device_train_batch_size", "8"]),
         (STATED, ["--per_device_train_batch_size", "8", "--learning_rate", "2e-4", "--max_grad_norm", "0.5",
                   "--adam_beta1", "0.8", "--adam_beta2", "0.99", "--weight_decay", "0.1"])]
    ):  # fmt: skip
        own, found = tmp_path / f"own{number}.json", tmp_path / f"found{number}.json"
        own.write_text(json.dumps(document))
        found.write_text(workload(document).extra_files(FOUND)[TRAINER_FILE])
        words = trainer_words(document, FOUND, "fp32")
        runs += [
            ["--deepspeed", str(own), *own_words],
            ["--deepspeed", str(found), *(rate if document is OPEN else []), *words],
        ]
    own_open, found_open, own_stated, found_stated = learning_rates(runs, tmp_path)
    assert len(own_open) == 4 and max(own_open) == pytest.approx(3e-4)
    assert len(set(own_open[:2])) == 2  # it warms up
    assert found_open == own_open
    assert found_stated == own_stated


def test_what_was_auto_stays_auto_but_for_what_was_found() -> None:
    laid = trainer_file(OPEN, FOUND, "fp32")
    assert laid == {**OPEN, "zero_optimization": {"stage": 1, **SMALL}}


def test_stated_batch_sizes_are_those_found_and_the_total_is_the_trainer_s_to_multiply() -> None:
    laid = trainer_file(STATED, FOUND, "fp32")
    assert laid["train_micro_batch_size_per_gpu"] == 4
    assert laid["train_batch_size"] == laid["gradient_accumulation_steps"] == "auto"


def test_arguments_that_must_follow_are_named() -> None:
    words = " ".join(trainer_words(STATED, FOUND, "bf16"))
    assert words == (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --bf16 True --max_grad_norm 0.5 "
        "--learning_rate 0.0002 --weight_decay 0.1 --adam_beta1 0.8 --adam_beta2 0.99"
    )
    [line] = workload(STATED, "bf16").in_code(FOUND)
    assert words in line and TRAINER_FILE in line


@pytest.mark.parametrize("document", [{}, {"gradient_clipping": 0.5}])
def test_file_without_auto_is_not_for_the_trainer(document: dict[str, Any]) -> None:
    assert workload(document).extra_files(FOUND) == {}
    assert workload(document).in_code(FOUND) == []


def test_precision_that_the_file_leaves_out_follows_the_trainer_s_argument() -> None:
    assert trainer_file({"train_batch_size": "auto"}, FOUND, "bf16")["bf16"] == {"enabled": "auto"}
    assert trainer_file({"bf16": {"enabled": True}}, FOUND, "bf16")["bf16"] == {"enabled": True}
