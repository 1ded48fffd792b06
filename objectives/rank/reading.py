"""How samples are read from a dataset's rows: which columns they come from, and how these are joined."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.values import (
    PARAGRAPH,
    Message,
    UnfitError,
    ids_of,
    is_chat,
    is_text,
    messages_of,
    text_of,
    type_words,
)

Row: TypeAlias = Mapping[str, Any]
Sample: TypeAlias = str | list[int] | list[Message]
"""A row to train on: its text, its token ids, or its messages."""

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")

SYSTEM_COLUMNS = ("system", "system_prompt")

PAIRS: Sequence[tuple[str, Sequence[str], Sequence[str]]] = (
    ("instruction", ("input", "context"), ("output", "response", "completion", "answer")),
    ("prompt", ("input", "context"), ("completion", "response", "output", "answer")),
    ("question", ("context",), ("answer", "response", "solution", "output")),
    ("query", ("context",), ("response", "answer", "output")),
    ("problem", (), ("solution", "answer")),
    ("input", (), ("output", "target", "response")),
)
"""Columns of pairs: what is asked, what may come with it, and the answer, of which one is needed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One way to make samples of rows."""

    columns: Sequence[str]
    """Columns that it needs."""
    words: str
    """These columns and what is done with them, for a person."""
    sample: Callable[[Row], Sample]
    """Sample of a row; raises UnfitError."""
    is_chat: bool = False
    """Samples are lists of messages."""
    is_ids: bool = False
    """Samples are token ids."""


def reading_of(name: str, first: Mapping[str, Any], text_column: str | None) -> Reading:
    """How to read a dataset.

    Args:
        name: the dataset's, for messages.
        first: by column, the first value there that is not empty.
        text_column: the column that the user named.

    Raises:
        UsageError: nothing is there to train on, or it is not clear what.
    """
    dataset = f"`dataset={name}`"
    if text_column is not None:
        return _asked(dataset, first, text_column)
    if "input_ids" in first:
        _check(dataset, "input_ids", ids_of, first["input_ids"])
        return Reading(
            columns=["input_ids"],
            words="column input_ids, token ids as they are",
            sample=lambda row: _of(row, "input_ids", ids_of),
            is_ids=True,
        )
    if is_text(first.get("text")):
        return _text(first, "text")
    for column in CHAT_COLUMNS:
        if is_chat(first.get(column), may_be_written=True):
            return _chat(column)
    found = _preference(first) or _pair(first)
    if found is not None:
        return found
    return _only_text(dataset, first)


def _asked(dataset: str, first: Mapping[str, Any], column: str) -> Reading:
    if column not in first:
        raise UsageError(f"`text_column={column}` is no column of {dataset} (it has {_listed(first)})")
    if is_chat(first[column], may_be_written=column in CHAT_COLUMNS):
        return _chat(column)
    _check(dataset, column, text_of, first[column], hint="; name another with `text_column`")
    return _text(first, column)


def _only_text(dataset: str, first: Mapping[str, Any]) -> Reading:
    texts = [column for column, value in first.items() if isinstance(value, str)]
    texts = texts or [column for column, value in first.items() if is_text(value)]
    if len(texts) == 1:
        found = _text(first, texts[0])
        return dataclasses.replace(found, words=f"{found.words}, the only one of text") if len(first) > 1 else found
    chats = [column for column, value in first.items() if is_chat(value)]
    if not texts and len(chats) == 1:
        return _chat(chats[0])
    if texts:
        raise UsageError(
            f"{dataset} has several columns of text and none is called text ({_listed(first)}); "
            "name one with `text_column`"
        )
    for column in CHAT_COLUMNS:
        if first.get(column) is not None:
            _check(dataset, column, messages_of, first[column])
    raise UsageError(f"{dataset} has neither text nor token ids to train on (it has {_listed(first)})")


def _text(first: Mapping[str, Any], column: str) -> Reading:
    joined = "" if isinstance(first[column], str | None) else ", lists of texts joined by blank lines"
    return Reading(columns=[column], words=f"column {column}{joined}", sample=lambda row: _of(row, column, text_of))


def _chat(column: str) -> Reading:
    return Reading(
        columns=[column],
        words=f"chats of column {column}",
        sample=lambda row: _of(row, column, messages_of),
        is_chat=True,
    )


def _preference(first: Mapping[str, Any]) -> Reading | None:
    """Pairs of a better and a worse answer, of which the better one is trained on."""
    if not {"chosen", "rejected"} <= set(first) or not (is_text(first["chosen"]) or is_chat(first["chosen"])):
        return None
    left_out = " (rejected is left out)"
    prompt = first.get("prompt")
    if is_chat(first["chosen"]) and messages_of(first["chosen"])[0]["role"] in ("system", "user"):
        found = _chat("chosen")  # the prompt is its beginning
        return dataclasses.replace(found, words=found.words + left_out)
    columns = ["prompt", "chosen"] if is_text(prompt) or is_chat(prompt) else ["chosen"]
    return _joined(first, columns, left_out)


def _pair(first: Mapping[str, Any]) -> Reading | None:
    """What is asked and what is answered."""
    usable = {column for column, value in first.items() if is_text(value) or is_chat(value)}
    for asked, extra, answers in PAIRS:
        answer = next((column for column in answers if column in usable), None)
        if asked in usable and answer is not None:
            system = [column for column in SYSTEM_COLUMNS if column in usable]
            # Of all that comes with it the first rows may be empty.
            present = [column for column in extra if column in usable or (column in first and first[column] is None)]
            return _joined(first, [*system, asked, *present, answer])
    return None


def _joined(first: Mapping[str, Any], columns: Sequence[str], note: str = "") -> Reading:
    """Samples of several columns: one chat if any of them holds messages, otherwise paragraphs of one text."""
    *others, last = columns
    named = f"columns {', '.join(others)} and {last}" if others else f"column {last}"
    if any(is_chat(first[column]) for column in columns):

        def chat(row: Row) -> Sample:
            return [message for column in columns for message in _part(row, column, is_answer=column == last)]

        return Reading(columns=columns, words=f"chats of {named}{note}", sample=chat, is_chat=True)

    def text(row: Row) -> Sample:
        return PARAGRAPH.join(each for column in columns if (each := _of(row, column, text_of)))

    joined = ", joined by a blank line" if others else ""
    return Reading(columns=columns, words=f"{named}{joined}{note}", sample=text)


def _part(row: Row, column: str, *, is_answer: bool) -> list[Message]:
    """Messages of a column of a chat, which may hold the text of one."""
    value = row[column]
    if isinstance(value, str):
        role = "assistant" if is_answer else "system" if column in SYSTEM_COLUMNS else "user"
        return [{"role": role, "content": value}] if value else []
    messages: list[Message] = _of(row, column, messages_of)
    return messages


def _of(row: Row, column: str, read: Callable[[Any], Any]) -> Any:
    try:
        return read(row[column])
    except UnfitError as error:
        raise UnfitError(f"column {column} {error}") from error


def _check(dataset: str, column: str, read: Callable[[Any], object], value: Any, *, hint: str = "") -> None:
    try:
        read(value)
    except UnfitError as error:
        raise UsageError(f"{dataset}: column {column} {error}{hint}") from error


def _listed(first: Mapping[str, Any]) -> str:
    """Columns with what they hold, for a message."""
    return ", ".join(f"{column}: {type_words(value)}" for column, value in first.items())
