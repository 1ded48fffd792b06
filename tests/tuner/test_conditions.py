"""Conditions over a configuration's fields: what they mean, and that they are never run as code."""

import pytest

from ds_tune.tuner.conditions import Condition

NAMES = ("zero_stage", "micro_batch_size", "compile", "ranks")
VALUES: dict[str, int | str] = {"zero_stage": 2, "micro_batch_size": 8, "compile": "blocks", "ranks": 4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero_stage == 2", True),
        ("zero_stage != 2", False),
        ("1 <= zero_stage < 3", True),
        ("micro_batch_size * ranks + 1 <= 32", False),
        ("micro_batch_size // 3 == 2 and micro_batch_size % 3 == 2", True),
        ("zero_stage in [0, 1] or compile == 'blocks'", True),
        ("compile not in ('off', 'model')", True),
        ("not (zero_stage == 2)", False),
        ("zero_stage - 3 == -1", True),
    ],
)
def test_a_condition_means_what_it_means_in_python(text: str, expected: bool) -> None:
    assert Condition(text, NAMES).holds(VALUES) is expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("zero_stage <", "is no condition"),
        ("", "is no condition"),
        ("micro_batch_size + 1", "compares nothing"),
        ("zero_stage", "compares nothing"),
        ("micro_batch == 4", "there is no micro_batch; is micro_batch_size meant?"),
        ("compile == blocks", "there is no blocks (words are put in quotes)"),
        ("__import__('os').getpid() > 0", "there is no __import__"),
        ("zero_stage.real > 0", "zero_stage.real is not understood"),
        ("micro_batch_size ** 2 > 4", "is not understood"),
        ("zero_stage / 2 > 1", "is not understood"),
        ("[ranks for ranks in [1]] == [1]", "is not understood"),
        ("(lambda: 1)() == 1", "is not understood"),
        ("zero_stage is 2", "is not understood"),
        ("zero_stage == 1.5", "is not understood"),
    ],
)
def test_malformed_condition_is_refused_with_its_text_and_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError) as refused:
        Condition(text, NAMES)
    assert why in str(refused.value)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "not " * 2000 + "zero_stage == 1",
        "not " * 100 + "zero_stage == 1",
        "-" * 2000 + "zero_stage == 1",
        "zero_stage ** " + "-" * 500 + "1 == 1",
        "zero_stage" + " + 1" * 50_000 + " == 1",
    ],
    ids=["2000 nots", "100 nots", "2000 signs", "signs where nothing may be", "50000 sums"],
)
def test_condition_nested_too_deeply_is_refused_with_its_first_60_characters(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        Condition(text, NAMES)
    assert str(refused.value) == f"{text[:60]!r}… is nested too deeply; write several conditions"


def test_long_conditions_are_not_deep_ones() -> None:
    assert Condition(" or ".join(["micro_batch_size == 8"] * 1000), NAMES).holds(VALUES)
    assert not Condition("not " * 51 + "(zero_stage == 2)", NAMES).holds(VALUES)


@pytest.mark.parametrize("text", ["compile * 10 == 'a'", "'%99999999999d' % zero_stage == ''", "[1] * 10 == [1]"])
def test_arithmetic_is_for_whole_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="is no arithmetic of whole numbers"):
        Condition(text, NAMES).holds(VALUES)


@pytest.mark.parametrize("text", ["compile < 3", "micro_batch_size % 0 == 1", "2 in zero_stage"])
def test_condition_that_cannot_be_evaluated_raises_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=text.split()[0]):
        Condition(text, NAMES).holds(VALUES)
