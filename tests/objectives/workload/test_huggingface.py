"""What a user asks to be trained, and the sentence for each thing that cannot be meant."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.ds_file import load_base_ds_config
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.huggingface import (
    HuggingFaceWorkload,
    check_workload,
    model_config_path,
)
from ds_tune.objectives.workload.kinds import workload_from_json

NANO = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32")


def refusal(**changes: Any) -> str:
    """The sentence that a workload is refused with."""
    with pytest.raises(UsageError) as raised:
        check_workload(dataclasses.replace(NANO, **changes))
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


def test_a_shipped_model_is_fine_as_it_is() -> None:
    check_workload(NANO)


def test_a_workload_survives_json() -> None:
    workload = dataclasses.replace(NANO, dataset="corpus.txt", base_ds_config={"zero_optimization": {"stage": 1}})
    assert workload_from_json(json.loads(json.dumps(workload.to_json()))) == workload


def test_an_unknown_model_is_told_what_there_is() -> None:
    sentence = refusal(model="gtp2")
    assert "`model=gtp2`" in sentence
    assert "gpt2-xl" in sentence


def test_a_hub_id_is_left_to_the_ranks() -> None:
    check_workload(dataclasses.replace(NANO, model="HuggingFaceTB/SmolLM2-135M"))


def test_a_folder_needs_a_configuration(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(model=str(tmp_path))


def test_a_configuration_must_be_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(model=str(tmp_path))


@pytest.mark.parametrize("content", ["[]", '{"hidden_size": 8}'])
def test_a_configuration_must_be_a_model_s(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "no model_type" in refusal(model=str(tmp_path))


def test_a_model_is_named_by_its_folder_or_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2"}')
    assert model_config_path(str(tmp_path)) == model_config_path(str(path)) == path
    check_workload(dataclasses.replace(NANO, model=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"n_head": 7}, "its n_embd of 768 cannot be divided among 7 heads (n_head)"),
        ({"n_layer": -1}, "its n_layer must be a whole number from 1 on, not -1"),
    ],
)
def test_a_model_whose_sizes_cannot_be_is_refused(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
    assert refusal(model=str(tmp_path)) == f"`model={tmp_path}` cannot be built: {why}"


@pytest.mark.parametrize(("model", "limit"), [("gpt2-nano", 256), ("gpt2", 1024)])
def test_a_sequence_longer_than_the_model_takes_is_refused(model: str, limit: int) -> None:
    check_workload(dataclasses.replace(NANO, model=model, seq_len=limit))
    assert f"at most {limit} positions" in refusal(model=model, seq_len=limit + 1)


def test_a_sequence_of_one_token_teaches_nothing() -> None:
    assert "`seq_len` must be at least 2" in refusal(seq_len=1)


def test_an_unknown_precision_is_told_what_there_is() -> None:
    assert refusal(dtype="fp8") == "`dtype=fp8` is none of fp16, bf16, fp32"


def test_a_dataset_that_is_not_there_is_refused() -> None:
    assert "no such file" in refusal(dataset="nowhere/*.txt")


def test_a_dataset_of_mixed_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.csv").touch()
    assert "all of one kind" in refusal(dataset=str(tmp_path))


def test_a_dataset_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").touch()
    assert "found .docx" in refusal(dataset=str(tmp_path / "a.docx"))


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    empty, full = tmp_path / "a.txt", tmp_path / "b.txt"
    empty.touch()
    assert refusal(dataset=str(empty)) == f"`dataset={empty}` is empty; name files with text or token ids in them"
    assert "is empty" in refusal(dataset=str(tmp_path))
    full.write_text("Some text.\n")
    check_workload(dataclasses.replace(NANO, dataset=str(tmp_path)))


def test_a_tokenizer_is_for_a_dataset(tmp_path: Path) -> None:
    sentence = "`tokenizer=words` is for the text of `dataset`, and synthetic tokens have none; "
    assert refusal(tokenizer="words").startswith(sentence)
    (tmp_path / "a.txt").write_text("Some text.\n")
    check_workload(dataclasses.replace(NANO, tokenizer="words", dataset=str(tmp_path)))


def test_a_deepspeed_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"overlap_comm": true}}')
    assert load_base_ds_config(path) == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"zero_optimization": 3}', "zero_optimization must be an object"),
        ('{"zero_optimization": null}', "zero_optimization must be an object"),
        ('{"zero_optimization": {"offload_optimizer": "cpu"}}', "zero_optimization.offload_optimizer must be an obj"),
        ('{"zero_optimization": {"reduce_bucket_size": Infinity}}', "reduce_bucket_size must be a number of elements"),
        (
            '{"zero_optimization": {"reduce_bucket_size": -1}}',
            "reduce_bucket_size must be a number of elements, not -1",
        ),
        ('{"optimizer": "AdamW"}', "optimizer must be an object"),
        ('{"optimizer": null}', "optimizer must be an object"),
        ('{"optimizer": {"params": {"lr": 1e-4}}}', 'optimizer.type must be the name of an optimizer, such as "AdamW"'),
        ('{"optimizer": {"type": 3}}', "optimizer.type must be the name of an optimizer"),
        ('{"optimizer": {"type": null}}', "optimizer.type must be the name of an optimizer"),
        ('{"optimizer": {"type": "AdamW", "params": [1e-4]}}', "optimizer.params must be an object"),
        ('{"optimizer": {"type": "AdamW", "params": null}}', "optimizer.params must be an object"),
        ('{"fp16": true}', "fp16 must be an object"),
        ('{"bf16": [true]}', "bf16 must be an object"),
        ('{"gradient_clipping": "much"}', "gradient_clipping must be a number from 0 on"),
        ('{"gradient_clipping": null}', "gradient_clipping must be a number from 0 on"),
        ('{"gradient_clipping": -1}', "gradient_clipping must be a number from 0 on"),
        ('{"gradient_clipping": NaN}', "gradient_clipping must be a number from 0 on"),
    ],
)
def test_a_file_that_is_no_deepspeed_configuration_is_refused(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError) as raised:
        load_base_ds_config(path)
    assert str(raised.value).startswith(f"`ds_config={path}`")
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_auto_is_accepted_for_any_value_of_a_deepspeed_configuration(tmp_path: Path) -> None:
    document = {
        "fp16": {"enabled": "auto"},
        "bf16": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": "auto"},
        "zero_optimization": {"stage": 3, "offload_optimizer": None, "reduce_bucket_size": "auto"},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(document))
    assert load_base_ds_config(path) == document
