"""Tokens of samples: by the tokenizer, by its chat template, or as bytes where there is no tokenizer."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.dataset import Samples, open_samples
from ds_tune.objectives.rank.reading import Sample
from ds_tune.objectives.rank.values import PARAGRAPH, Message
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload, model_config_path


class Encoder:
    """Samples to token ids.

    A shipped model has no tokenizer on disk: its text is read as bytes. How fast a model trains does not depend on
    which ids it sees, so bytes measure the same.
    """

    def __init__(self, workload: HuggingFaceWorkload) -> None:
        """
        Raises:
            UsageError: there should be a tokenizer and is none.
        """
        self._tokenizer: Any = _tokenizer(workload) if tokenizer_is_needed(workload) else None

    @property
    def reads_bytes(self) -> bool:
        """Whether there is no tokenizer."""
        return self._tokenizer is None

    @property
    def chat_words(self) -> str:
        """How chats become text, for a person."""
        if self._has_template:
            return "by the tokenizer's chat template"
        return 'as "role: content" between blank lines, for there is no chat template'

    @property
    def _has_template(self) -> bool:
        return getattr(self._tokenizer, "chat_template", None) is not None

    def encode(self, sample: Sample) -> list[int]:
        """Token ids of a sample.

        Raises:
            UsageError: the chat template refuses its messages.
        """
        if isinstance(sample, str):
            return self._tokens(sample)
        messages = [each for each in sample if isinstance(each, dict)]
        if not messages:
            return [each for each in sample if isinstance(each, int)]
        if not self._has_template:
            return self._tokens(plain_chat(messages))
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program of whoever wrote it, and raises what it likes
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            roles = ", ".join(str(message["role"]) for message in messages[:6])
            raise UsageError(
                f"the tokenizer's chat template refuses messages of `dataset` (roles {roles}): {said}"
            ) from error
        # The template writes the special tokens itself.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokens(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return list(text.encode())
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids


MOST_SAMPLES = 4096
"""Samples that are used where each has its own length: as many as tell how lengths are spread."""


def sample_ids(workload: HuggingFaceWorkload, samples: Samples | None = None) -> Iterator[list[int]]:
    """Token ids of the first samples of a dataset, each cut at `seq_len`; those without a target are passed over.

    Args:
        samples: those of the dataset, where it is open.

    Raises:
        UsageError: the dataset cannot be read.
    """
    if samples is None:
        assert workload.dataset is not None
        samples = open_samples(workload.dataset, workload.text_column)
    encode: Callable[[Any], list[int]] = list if samples.reading.is_ids else Encoder(workload).encode
    cut = (encode(sample)[: workload.seq_len] for sample in samples)
    return itertools.islice((ids for ids in cut if len(ids) > 1), MOST_SAMPLES)


def plain_chat(messages: list[Message]) -> str:
    """A chat as text where no template says how: `role: content`, with blank lines between messages."""
    return PARAGRAPH.join(f"{message['role']}: {message['content']}" for message in messages)


def tokenizer_is_needed(workload: HuggingFaceWorkload) -> bool:
    """Whether text has to be tokenized: by a tokenizer that is named, or by the model's where it could have one."""
    if workload.tokenizer is not None or workload.pretrained:
        return True
    if workload.model in SHIPPED_MODELS:
        return False
    path = model_config_path(workload.model)
    return path is None or any(path.parent.glob("token*")) or (path.parent / "vocab.json").is_file()


def _tokenizer(workload: HuggingFaceWorkload) -> Any:
    # Imported late: it takes three seconds, and a look at text or at token ids does not need it.
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(workload.tokenizer or workload.model)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer for `dataset`: {str(error).splitlines()[0]} (name one with `tokenizer`)"
        ) from error
