"""Words of sentences: short, in one line, and in the right number."""

from typing import Any

import pytest

from ds_tune.objectives.words import counted, plain, shown


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


def test_what_a_person_typed_has_no_quotes_unless_it_is_long_or_unprintable() -> None:
    assert plain("24 lots") == "24 lots"
    assert plain("x" * 61) == shown("x" * 61)
    assert plain("\x1b[31m") == shown("\x1b[31m")
    assert plain(7) == "7"


def test_only_one_is_in_the_singular() -> None:
    assert [counted(count, "trial") for count in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
