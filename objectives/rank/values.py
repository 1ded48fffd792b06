"""Values of a dataset's cells, told by what they hold: text, chats, token ids; and words for what they are.

By values and not by the types of `datasets`, which differ between file formats, and say "JSON" where rows differ.
"""

import ast
import itertools
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""With `role` and `content`, both text, and what else a chat template may want."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that ShareGPT's files give roles, and those that chat templates know."""

PARAGRAPH = "\n\n"
"""Between texts that make one sample: a blank line."""


class UnfitError(ValueError):
    """A value that cannot be trained on; the text says what it is, as the end of a sentence."""


def type_words(value: Any) -> str:
    """What a value is, without an article: `text`, `list of lists of integers`, `object of role, content`."""
    return _words(value)[0]


def _words(value: Any) -> tuple[str, str]:
    """The same for one, and for several of its kind."""
    match value:
        case None:
            return "empty", "empty values"
        case bool():
            return "true or false", "true or false"
        case int():
            return "integer", "integers"
        case float():
            return "number", "numbers"
        case str():
            return "text", "texts"
        case Mapping():
            keys = ", ".join(itertools.islice(value, 6))
            return f"object of {keys}", f"objects of {keys}"
        case list() | tuple():
            inside = next((each for each in value if each is not None), None)
            of = f" of {_words(inside)[1]}" if len(value) else ""
            if inside is not None and not isinstance(inside, str) and None in value:
                of += " with gaps"
            return f"list{of}", f"lists{of}"
    return type(value).__name__, f"{type(value).__name__} values"


def _one(value: Any) -> str:
    """The same with its article."""
    words = type_words(value)
    if words.startswith(("list", "number")):
        return f"a {words}"
    return f"an {words}" if words.startswith(("integer", "object")) else words


def is_text(value: Any) -> bool:
    """Whether a value is text, or a list of texts."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(each, str | None) for each in value)
    )


def text_of(value: Any) -> str:
    """Text of a value; texts of a list are paragraphs of one, and an empty cell is empty text.

    Raises:
        UnfitError: it is something else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(each, str | None) for each in value):
        return PARAGRAPH.join(each for each in value if each)
    raise UnfitError(f"is {_one(value)}, not text")


def ids_of(value: Any) -> list[int]:
    """Token ids of a value.

    Raises:
        UnfitError: it is something else than a list of integers.
    """
    if value is None:
        return []
    if isinstance(value, list | tuple) and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return list(value)
    raise UnfitError(f"is {_one(value)}, and token ids must be a list of integers in each row")


def is_chat(value: Any, *, may_be_written: bool = False) -> bool:
    """Whether a value is a list of messages.

    Args:
        may_be_written: it may be the text of one, as CSV files have it.
    """
    if isinstance(value, str) and not may_be_written:
        return False
    try:
        return bool(messages_of(value))
    except UnfitError:
        return False


def messages_of(value: Any) -> list[Message]:
    """Messages of a value: `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        UnfitError: it is something else.
    """
    if value is None:
        return []
    found = _written(value) if isinstance(value, str) else value
    if isinstance(found, list | tuple):
        return [_message(each) for each in found if each is not None]
    raise UnfitError(f"is {_one(value)}, not a list of messages")


def _written(text: str) -> Any:
    """The list that a text is, in JSON or in Python."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _message(value: Any) -> Message:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(value, Mapping) and role in value and content in value:
            speaker = str(value[role])
            others = {key: each for key, each in value.items() if key not in (role, content) and each is not None}
            return {"role": ROLES.get(speaker, speaker), "content": _content(value[content]), **others}
    raise UnfitError(f"has messages that are {_words(value)[1]}, and need role and content, or from and value")


def _content(value: Any) -> str:
    """Text of a message's content, which may be in parts; parts that are no text, such as images, are left out."""
    if value is None:  # of a message that only calls a tool
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        texts = (part.get("text") if isinstance(part, Mapping) else part for part in value)
        return PARAGRAPH.join(text for text in texts if isinstance(text, str))
    raise UnfitError(f"has messages whose content is {_one(value)}, not text")
