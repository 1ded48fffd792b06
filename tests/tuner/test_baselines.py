"""Where a search begins: with the untuned configuration, or with what is likely to fit in its place."""

import pytest

from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.proposer import Proposer
from ds_tune.tuner.space import Space

XL = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")


def baselines_on(hardware: str, workload: HuggingFaceWorkload = XL) -> list[str]:
    model = CostModel(workload, parse_hardware(hardware))
    space = Space(Limits(ranks=model.hardware.ranks, max_micro_batch=8, max_global_batch=256))
    return [config.name for config in Proposer(model, space.legal).baselines(space.baselines, [])]


@pytest.mark.parametrize(
    ("hardware", "stages"),
    [
        ("2xH200", [0, 1, 2, 3]),
        # 35 GiB in 31.7: not beyond all doubt before anything was measured, but hardly.
        ("2xV100-32GB", [1, 2, 3, 0]),
        ("16xV100-16GB", [1, 2, 3]),
    ],
    ids=["all fit", "the first is unlikely to", "it certainly does not"],
)
def test_the_baselines_that_are_unlikely_to_fit_wait(hardware: str, stages: list[int]) -> None:
    assert baselines_on(hardware) == [f"z{stage}_gas1_tmbspg1" for stage in stages]


def test_last_untuned_configuration_is_the_baseline_where_none_is_likely_to_fit() -> None:
    assert baselines_on("1xV100-16GB") == ["z3_gas1_tmbspg1"]
