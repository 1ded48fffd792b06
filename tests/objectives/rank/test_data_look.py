"""What is said of a dataset before anything is trained: columns, template and tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.data import load_blocks
from ds_tune.objectives.rank.data_look import look_at
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

CHAT = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "fox"}]
BYTES = "read as bytes, without a tokenizer"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s> {{ message['content'] }} {% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Folder of a tokenizer of four words, which has a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"the": 0, "quick": 1, "?": 2, "<s>": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=TEMPLATE)
    made.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def of(path: Path, row: Any, **fields: Any) -> HuggingFaceWorkload:
    """A workload on a dataset of one row."""
    path.write_text(json.dumps(row) + "\n")
    return HuggingFaceWorkload(model="gpt2-nano", seq_len=4, dtype="fp32", dataset=str(path), **fields)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "one"}, f"column text; {BYTES}"),
        ({"input_ids": [1, 2]}, "column input_ids, token ids as they are"),
        (
            {"messages": CHAT},
            f'chats of column messages as "role: content" between blank lines, for there is no chat template; {BYTES}',
        ),
    ],
)
def test_columns_and_bytes_are_said(tmp_path: Path, row: Any, words: str) -> None:
    assert look_at(of(tmp_path / "d.jsonl", row)).words == words


def test_chat_template_of_the_tokenizer_is_used_and_said(tmp_path: Path, tokenizer: Path) -> None:
    workload = of(tmp_path / "d.jsonl", {"messages": CHAT}, tokenizer=str(tokenizer))
    assert look_at(workload).words == "chats of column messages by the tokenizer's chat template"
    assert load_blocks(workload, vocab_size=100)["input_ids"][:].tolist() == [[3, 0, 1, 3]]


def test_chat_without_a_template_is_text_with_roles(tmp_path: Path) -> None:
    workload = of(tmp_path / "d.jsonl", {"messages": CHAT})
    text = b"user: the quick\n\nassistant: fox"
    blocks = load_blocks(workload, vocab_size=256)["input_ids"][:].flatten().tolist()
    assert blocks == list(text[: len(text) // 4 * 4])


def test_chat_that_the_template_refuses_is_told_with_its_roles(tmp_path: Path, tokenizer: Path) -> None:
    row = {"messages": [CHAT[0], {"role": "tool", "content": "7"}]}
    with pytest.raises(UsageError) as raised:
        look_at(of(tmp_path / "d.jsonl", row, tokenizer=str(tokenizer)))
    sentence = "the tokenizer's chat template refuses messages of `dataset` (roles user, tool): no tools here"
    assert str(raised.value) == sentence
