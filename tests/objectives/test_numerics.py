"""Two configurations' losses side by side: what is rounding, and what is another training."""

import pytest

from ds_tune.objectives.numerics import FIRST_LOSS_TOLERANCE, LEARNED_TOLERANCE, STEPS, LossCurve, NumericsCheck


def falling(*, by: float = 0.02, start: float = 10.8, steps: int = STEPS) -> LossCurve:
    return LossCurve(losses=tuple(start - by * step for step in range(steps)), skipped_steps=0)


def check(curve: LossCurve, *, dtype: str = "fp16", reference: LossCurve | None = None) -> NumericsCheck:
    return NumericsCheck(
        reference="z0_gas1_tmbspg1", dtype=dtype, curve=curve, reference_curve=reference or falling()
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_loss_difference_within_rounding_is_accepted(dtype: str) -> None:
    start = 10.8 * (1 + FIRST_LOSS_TOLERANCE[dtype] / 2)
    assert check(falling(start=start), dtype=dtype).fault is None
    slower = falling(by=0.02 * (1 - LEARNED_TOLERANCE[dtype] / 2))
    assert check(slower, dtype=dtype).fault is None


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_another_learning_is_not(dtype: str) -> None:
    fault = check(falling(by=0.02 * (1 - 2 * LEARNED_TOLERANCE[dtype])), dtype=dtype).fault
    assert fault is not None and "of what was learned" in fault and "z0_gas1_tmbspg1" in fault


def test_padded_logits_that_were_left_in_the_loss_are_found() -> None:
    """47 columns beside GPT-2's 50257 change the loss by the logarithm of their ratio: 0.0009 of 10.8."""
    fault = check(falling(start=10.8 + 0.00094)).fault
    assert fault is not None and fault.startswith("its first loss is 10.80094, that of z0_gas1_tmbspg1")


def test_a_loss_that_ended_in_infinity_is_a_fault_where_the_references_did_not() -> None:
    assert check(falling(steps=7)).fault == "its loss is not finite at step 8, that of z0_gas1_tmbspg1 is"
    assert check(falling(steps=0)).fault == "its loss is not finite at step 1, that of z0_gas1_tmbspg1 is"
    assert check(falling(steps=7), reference=falling(steps=7)).fault is None


def test_any_learning_is_a_fault_where_the_reference_learns_nothing() -> None:
    still = falling(by=0.0)
    assert check(still, reference=still).fault is None
    assert check(falling(by=0.001), reference=still).fault is not None


def test_a_check_comes_back_from_json_as_it_was() -> None:
    one = check(falling(start=10.9))
    assert NumericsCheck.from_json(one.to_json()) == one
