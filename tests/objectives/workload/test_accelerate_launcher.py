"""What `accelerate launch` hands a script is changed where the person has it: in the YAML, or among its options."""

from pathlib import Path

import pytest
import yaml

from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.accelerate_launcher import tuned_launcher, tuned_yaml

CONFIG = TrialConfig(zero_stage=2, micro_batch_size=8, gradient_accumulation_steps=3)
YAML = """\
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  zero3_init_flag: false
  zero_stage: 3
mixed_precision: bf16
num_processes: 2
"""


def test_yaml_gets_stage_and_accumulation_and_keeps_the_rest() -> None:
    before, after = yaml.safe_load(YAML), yaml.safe_load(tuned_yaml(YAML, CONFIG))
    assert after["deepspeed_config"] == {
        **before["deepspeed_config"],
        "gradient_accumulation_steps": 3,
        "zero_stage": 2,
    }
    assert {key: value for key, value in after.items() if key != "deepspeed_config"} == {
        key: value for key, value in before.items() if key != "deepspeed_config"
    }
    assert list(after) == list(before)


SET = ["--zero_stage", "2", "--gradient_accumulation_steps", "3"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config_file", "a.yaml", "--x", "1"], ["--config_file", "/r/accelerate_optimal.yaml", "--x", "1"]),
        (["--config_file=a.yaml"], ["--config_file=/r/accelerate_optimal.yaml"]),
        (["--use_deepspeed", "--zero_stage", "1"], ["--use_deepspeed", *SET]),
        (["--zero_stage=1"], SET),
    ],
)
def test_launcher_s_own_words_follow(words: list[str], expected: list[str]) -> None:
    assert tuned_launcher(["accelerate", "launch", *words], Path("/r"), CONFIG) == ["accelerate", "launch", *expected]
