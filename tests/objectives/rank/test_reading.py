"""Columns that are chosen of a dataset, how they are joined, and what is said of it."""

from collections.abc import Mapping
from typing import Any

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.reading import Reading, Sample, reading_of

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CHAT = [USER, ASSISTANT]


def read(row: Mapping[str, Any], text_column: str | None = None) -> tuple[Reading, Sample]:
    reading = reading_of("d.jsonl", row, text_column)
    return reading, reading.sample(row)


@pytest.mark.parametrize(
    ("row", "sample", "words"),
    [
        ({"input_ids": [1, 2], "text": "a"}, [1, 2], "column input_ids, token ids as they are"),
        ({"text": "a", "instruction": "b", "output": "c"}, "a", "column text"),
        ({"text": ["a", "b"]}, "a\n\nb", "column text, lists of texts joined by blank lines"),
        ({"messages": CHAT, "source": "web", "id": "7"}, CHAT, "chats of column messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [USER], "chats of column conversations"),
        ({"thread": CHAT, "score": 1}, CHAT, "chats of column thread"),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "a\n\nb\n\nc",
            "columns instruction, input and output, joined by a blank line",
        ),
        (
            {"instruction": "a", "input": None, "output": "c"},
            "a\n\nc",
            "columns instruction, input and output, joined by a blank line",
        ),
        (
            {"prompt": "a", "completion": "b", "id": "7"},
            "a\n\nb",
            "columns prompt and completion, joined by a blank line",
        ),
        ({"question": "a", "answer": "b"}, "a\n\nb", "columns question and answer, joined by a blank line"),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            "s\n\na\n\nb",
            "columns system_prompt, question and response, joined by a blank line",
        ),
        ({"prompt": [USER], "completion": [ASSISTANT]}, CHAT, "chats of columns prompt and completion"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "a\n\nb",
            "columns prompt and chosen, joined by a blank line (rejected is left out)",
        ),
        ({"chosen": "b", "rejected": "c"}, "b", "column chosen (rejected is left out)"),
        ({"chosen": CHAT, "rejected": CHAT}, CHAT, "chats of column chosen (rejected is left out)"),
        ({"prompt": "Hi", "chosen": CHAT, "rejected": CHAT}, CHAT, "chats of column chosen (rejected is left out)"),
        (
            {"prompt": "Hi", "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
            CHAT,
            "chats of columns prompt and chosen (rejected is left out)",
        ),
        ({"content": "a", "n": 1}, "a", "column content, the only one of text"),
        ({"story": "a"}, "a", "column story"),
        (
            {"n": 1, "lines": ["a", "b"]},
            "a\n\nb",
            "column lines, lists of texts joined by blank lines, the only one of text",
        ),
    ],
)
def test_columns_are_found_and_said(row: Mapping[str, Any], sample: Sample, words: str) -> None:
    reading, made = read(row)
    assert (made, reading.words) == (sample, words)
    assert set(reading.columns) <= set(row)
    assert reading.is_chat == (isinstance(sample, list) and isinstance(sample[0], dict))


@pytest.mark.parametrize(
    ("row", "column", "sample", "words"),
    [
        ({"text": "a", "body": "b"}, "body", "b", "column body"),
        ({"text": "a", "talk": CHAT}, "talk", CHAT, "chats of column talk"),
        ({"input_ids": [[1]], "body": "b"}, "body", "b", "column body"),
        ({"text": "a", "body": None}, "body", "", "column body"),
    ],
)
def test_column_that_was_named_is_read_whatever_else_there_is(
    row: Mapping[str, Any], column: str, sample: Sample, words: str
) -> None:
    reading, made = read(row, column)
    assert (made, reading.words, list(reading.columns)) == (sample, words, [column])


@pytest.mark.parametrize(
    ("row", "column", "sentence"),
    [
        (
            {"input_ids": [[1, 2]]},
            None,
            "`dataset=d.jsonl`: column input_ids is a list of lists of integers, and token ids must be a list of "
            "integers in each row",
        ),
        (
            {"input_ids": ["1"], "text": "a"},
            None,
            "`dataset=d.jsonl`: column input_ids is a list of texts, and token ids must be a list of integers in each "
            "row",
        ),
        (
            {"content": "a", "source": "b", "n": 1},
            None,
            "`dataset=d.jsonl` has several columns of text and none is called text (content: text, source: text, "
            "n: integer); name one with `text_column`",
        ),
        (
            {"messages": [{"speaker": "a", "words": "b"}]},
            None,
            "`dataset=d.jsonl`: column messages has messages that are objects of speaker, words, and need role and "
            "content, or from and value",
        ),
        (
            {"text": 7, "vector": [0.5]},
            None,
            "`dataset=d.jsonl` has neither text nor token ids to train on (it has text: integer, "
            "vector: list of numbers)",
        ),
        ({"a": "b"}, "c", "`text_column=c` is no column of `dataset=d.jsonl` (it has a: text)"),
        (
            {"a": 7, "b": "c"},
            "a",
            "`dataset=d.jsonl`: column a is an integer, not text; name another with `text_column`",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_column_and_type(
    row: Mapping[str, Any], column: str | None, sentence: str
) -> None:
    with pytest.raises(UsageError) as raised:
        read(row, column)
    assert str(raised.value) == sentence
