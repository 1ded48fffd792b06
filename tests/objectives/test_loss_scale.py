"""DeepSpeed forgets fp16's loss scale at ZeRO stage 0; the installed one really does."""

import subprocess
import sys

import pytest

from ds_tune.objectives.loss_scale import forgets_loss_scale

FIRST_STEP = """
import sys
import deepspeed, torch
from deepspeed.accelerator import get_accelerator
from ds_tune.objectives.rank.distributed import skip_unused_ops

get_accelerator().is_fp16_supported = lambda: True  # torch has fp16 on a CPU, which DeepSpeed does not know
skip_unused_ops()
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": int(sys.argv[1])},
    "fp16": {"enabled": True},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
before = engine.module.weight.detach().float().clone()
engine.backward(engine(torch.ones(4, 8, dtype=torch.float16)).float().square().mean())
engine.step()
print("moved by", float((engine.module.weight.detach().float() - before).abs().mean()))
"""


def first_step(stage: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far an Adam step of 0.1 moves a weight, on average."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", FIRST_STEP, str(stage)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("moved by", 1)[1])


def test_installed_deepspeed_loses_fp16_gradients_at_stage_0_and_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails with the first DeepSpeed that is mended: end the range of `FORGETS_AT_STAGE_0` there."""
    assert first_step(1, monkeypatch) == pytest.approx(0.1, rel=0.01)
    moved = first_step(0, monkeypatch)
    assert forgets_loss_scale(0, "fp16") == (moved < 0.09)
    assert moved < 0.09


@pytest.mark.parametrize(
    ("stage", "dtype", "version", "forgets"),
    [
        (0, "fp16", "0.19.8", True),
        (0, "fp16", "0.18.3", True),
        (0, "fp16", "0.18.2", False),
        (1, "fp16", "0.19.8", False),
        (0, "bf16", "0.19.8", False),
        (0, "fp32", "0.19.8", False),
    ],
)
def test_loss_scale_is_forgotten_in_fp16_at_stage_0_since_0_18_3(
    stage: int, dtype: str, version: str, forgets: bool
) -> None:
    assert forgets_loss_scale(stage, dtype, version) is forgets
