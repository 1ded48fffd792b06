"""What a dataset's cells hold, and the words for it."""

import json
from typing import Any

import pytest

from ds_tune.objectives.rank.values import UnfitError, ids_of, is_chat, messages_of, text_of, type_words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "empty"),
        (True, "true or false"),
        (7, "integer"),
        (0.5, "number"),
        ("a", "text"),
        ([], "list"),
        ([1], "list of integers"),
        ([[1, 2]], "list of lists of integers"),
        ([None, "a"], "list of texts"),
        ({"role": "user", "content": ""}, "object of role, content"),
        ([{"speaker": "a"}], "list of objects of speaker"),
        (b"a", "bytes"),
    ],
)
def test_type_is_told_in_plain_words(value: Any, words: str) -> None:
    assert type_words(value) == words


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), ("a", "a"), (["a", "b"], "a\n\nb"), (["a", None, "", "b"], "a\n\nb"), ([], "")]
)
def test_text_of_a_cell_joins_lists_by_blank_lines(value: Any, text: str) -> None:
    assert text_of(value) == text


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    "value",
    [
        MESSAGES,
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}, MESSAGES[1]],
        [{"role": "user", "content": ["Hi"], "name": None}, MESSAGES[1], None],
        json.dumps(MESSAGES),
        str(MESSAGES),
    ],
    ids=["messages", "sharegpt", "parts", "holes", "json", "python"],
)
def test_messages_are_the_same_however_they_are_written(value: Any) -> None:
    assert messages_of(value) == MESSAGES


def test_what_else_a_message_has_is_kept_for_the_template() -> None:
    [message] = messages_of([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "name": None}])
    assert message == {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}


def test_written_messages_are_a_chat_only_where_one_is_expected() -> None:
    assert is_chat(json.dumps(MESSAGES), may_be_written=True)
    assert not is_chat(json.dumps(MESSAGES))
    assert not is_chat("Hello.", may_be_written=True)
    assert not is_chat([], may_be_written=True)


@pytest.mark.parametrize(
    ("read", "value", "words"),
    [
        (text_of, 7, "is an integer, not text"),
        (text_of, [["a"]], "is a list of lists of texts, not text"),
        (ids_of, [[1, 2]], "is a list of lists of integers, and token ids must be a list of integers in each row"),
        (ids_of, ["1"], "is a list of texts, and token ids"),
        (ids_of, "[1, 2]", "is text, and token ids"),
        (ids_of, 3, "is an integer, and token ids"),
        (ids_of, [0.5], "is a list of numbers, and token ids"),
        (ids_of, [1, None], "is a list of integers with gaps, and token ids"),
        (messages_of, [{"speaker": "a", "words": "b"}], "has messages that are objects of speaker, words, and need"),
        (messages_of, ["a"], "has messages that are texts, and need role and content, or from and value"),
        (messages_of, [{"role": "user", "content": {"a": 1}}], "content is an object of a, not text"),
        (messages_of, "Hello.", "is text, not a list of messages"),
    ],
)
def test_value_that_does_not_fit_is_named_with_its_type(read: Any, value: Any, words: str) -> None:
    with pytest.raises(UnfitError) as raised:
        read(value)
    assert words in str(raised.value)
