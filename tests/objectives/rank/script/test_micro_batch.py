"""What is seen of one micro-batch."""

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from ds_tune.objectives.rank.micro_batch import MicroBatch
from ds_tune.objectives.rank.script.observer import positional_names

IDS = torch.ones(2, 5, dtype=torch.long)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
TWO_IN_A_ROW = torch.tensor([[0, 1, 2, 0, 1]])


class Model(torch.nn.Module):
    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return tokens * attention_mask


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}),
        ((), {"labels": torch.ones(2), "attention_mask": MASK, "input_ids": IDS}),
        ((IDS,), {"attention_mask": MASK}),
        ((IDS, MASK), {}),
        ((BatchEncoding({"input_ids": IDS, "attention_mask": MASK}),), {}),
    ],
)
def test_tokens_are_those_of_the_mask_however_it_is_handed_over(args: Any, kwargs: Any) -> None:
    batch = MicroBatch(args, kwargs, positional_names(Model()))
    assert (batch.rows, batch.width, batch.lengths(), batch.is_packed()) == (2, 5, [5, 2], False)
    count = batch.count(is_packed=False)
    assert isinstance(count, torch.Tensor) and int(count) == 7


@pytest.mark.parametrize(
    "kwargs",
    [
        {"input_ids": IDS[:1], "position_ids": TWO_IN_A_ROW},
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 5])},
        {"input_ids": IDS[0], "position_ids": TWO_IN_A_ROW[0]},
    ],
)
def test_samples_put_into_one_row_are_packed(kwargs: Any) -> None:
    batch = MicroBatch((), kwargs, ())
    assert (batch.is_packed(), batch.rows, batch.count(is_packed=True)) == (True, 1, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "rows"),
    [
        ((IDS,), {}, 2),  # of which some may be padding
        ((IDS[:1],), {"position_ids": torch.arange(5)[None]}, 1),
        ((torch.ones(2, 5),), {}, 2),
        ((torch.ones(3, dtype=torch.long),), {}, 3),
        ((), {}, 0),
    ],
)
def test_rows_that_are_neither_masked_nor_packed_have_no_known_tokens(args: Any, kwargs: Any, rows: int) -> None:
    batch = MicroBatch(args, kwargs, ())
    assert (batch.rows, batch.is_packed(), batch.is_empty) == (rows, False, rows == 0)
    assert batch.count(is_packed=False) is None
