"""Which steps of a script are timed."""

import pytest

from ds_tune.objectives.rank.script.whole_steps import WholeSteps


def judged(batches: list[int], passes: int, *, accumulation: int, size: int = 2) -> str:
    """Steps over some passes of batches with so many rows: `+` for one that is timed."""
    steps, text, micro_steps = WholeSteps(size * accumulation), "", 0
    for number in range(passes):
        for index, rows in enumerate(batches):
            if number and not index:
                steps.data_began_again()
            steps.fed(rows)
            micro_steps += 1
            if micro_steps % accumulation == 0:
                text += "+" if steps.step_done() else "-"
    return text


@pytest.mark.parametrize(
    ("batches", "accumulation", "timed"),
    [
        ([2, 2, 2, 2], 1, "++++ -+++ -+++"),  # it began again, which is rare
        ([2, 2, 2, 1], 1, "+++- -++- -++-"),
        ([2], 1, "+ + +"),  # it begins again in each step
        ([2, 2, 1], 2, "+ - - +"),  # neither is rare: 1 + 2, and 2 + 1, are no whole steps
        ([2, 1], 2, "- - -"),
    ],
)
def test_steps_with_fewer_samples_or_a_rare_beginning_are_left_out(
    batches: list[int], accumulation: int, timed: str
) -> None:
    assert judged(batches, 3, accumulation=accumulation) == timed.replace(" ", "")
