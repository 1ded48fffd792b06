"""The plain training script, under DeepSpeed's own launcher, with a configuration that ds-tune wrote."""

import base64
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload


def test_deepspeed_s_launcher_runs_it_with_a_configuration_of_a_trial(
    workload: HuggingFaceWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrialConfig(zero_stage=1, micro_batch_size=2, gradient_accumulation_steps=2)
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed_config(config, workload, ranks=2, device="cpu")))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(port)]
    script = [
        "--module",
        "ds_tune.objectives.rank.train",
        "--model",
        "gpt2-nano",
        "--seq-len",
        "32",
        "--json",
        tmp_path / "out.json",
    ]
    steps = ["--warmup-steps", "1", "--steps", "2"]
    deepspeed = ["--deepspeed", "--deepspeed_config", tmp_path / "ds.json"]
    result = subprocess.run(
        [*launcher, *script, *steps, *deepspeed], capture_output=True, text=True, timeout=280, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr

    document = json.loads((tmp_path / "out.json").read_text())
    assert document["steps"] == 2
    assert document["samples_per_second"] == pytest.approx(2 * 8 / document["seconds"])
    printed = re.findall(r"^([\d.]+) samples/s over 2 steps of 8 samples$", result.stdout, re.MULTILINE)
    assert [float(figure) for figure in printed] == [pytest.approx(document["samples_per_second"], abs=0.001)]


def encoded(document: object) -> str:
    """As DeepSpeed's autotuner passes a configuration to the script."""
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode()


def test_a_configuration_is_a_file_or_base64_of_one(tmp_path: Path) -> None:
    train = pytest.importorskip("ds_tune.objectives.rank.train")
    document = {"train_micro_batch_size_per_gpu": 1, "note": "ÿþ>>??" * 100}
    (tmp_path / "ds.json").write_text(json.dumps(document))
    assert train.load_ds_config(str(tmp_path / "ds.json")) == document
    assert train.load_ds_config(encoded(document)) == document


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (None, "is needed"),
        ("missing.json", "missing.json: no such file"),
        ("missing", "missing: no such file"),
        ("broken.json", "broken.json is not JSON"),
        ("folder", "folder: no such file"),
        (encoded([1]), "must hold a JSON object"),
    ],
)
def test_unusable_deepspeed_configuration_argument_raises_a_value_error_saying_why(
    argument: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = pytest.importorskip("ds_tune.objectives.rank.train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=words):
        train.load_ds_config(argument)
