"""Words of sentences: short, in one line, and in the right number."""

from typing import Any

import pytest

from ds_tune.objectives.words import counted, shown


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "7"),
        ("seven", "'seven'"),
        ("\x1b[31m\nred", r"'\x1b[31m\nred'"),
        ("\ud800", r"'\ud800'"),
        ("x" * 100, f"'{'x' * 59}…"),
        (10**5000, "a number of thousands of digits"),
    ],
    ids=range(6),
)
def test_a_wrong_value_is_shown_in_a_short_line(value: Any, words: str) -> None:
    assert shown(value) == words


def test_only_one_is_in_the_singular() -> None:
    assert [counted(count, "trial") for count in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
