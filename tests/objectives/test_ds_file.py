"""A person's DeepSpeed file is read as DeepSpeed reads it."""

import json
from pathlib import Path
from typing import Any

import hjson
import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.zero.config import get_zero_config

from ds_tune.objectives.ds_file import KNOWN_KEYS, parsed, read_ds_file, unknown_keys
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.script import read_ds_config


def document_of(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(text, encoding="utf-8")
    return read_ds_file(path).document


@pytest.mark.parametrize(
    "text",
    [
        '{\n  // for two GPUs\n  "zero_optimization": {"stage": 2},  # was 3\n}',
        '{"zero_optimization": {"stage": 2, /* none */ "overlap_comm": true,},}',
        '\ufeff{"zero_optimization": {"stage": 2}}',
        "{zero_optimization: {stage: 2}\n gradient_clipping: 0.5}",
        '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},\n}',
    ],
    ids=["comments", "trailing commas", "byte order mark", "no quotes", "exponent"],
)
def test_what_deepspeed_reads_is_read_alike(text: str, tmp_path: Path) -> None:
    expected = hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    assert document_of(tmp_path, text) == expected
    assert read_ds_config(tmp_path / "ds.json") == expected  # of a script


@pytest.mark.parametrize("comment", ["", "// twice\n"])
def test_key_that_is_there_twice_is_refused_at_any_depth(comment: str, tmp_path: Path) -> None:
    text = comment + '{"zero_optimization": {"stage": 2, "overlap_comm": true, "stage": 3}}'
    with pytest.raises(ValueError, match="Duplicate keys"):
        hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    with pytest.raises(UsageError, match="it has stage twice, which DeepSpeed refuses; leave one out"):
        document_of(tmp_path, text)


@pytest.mark.parametrize(
    "written",
    [
        {"zero_optimization": True},
        {"zero_optimization": True, "allgather_size": 1000},
        {"zero_optimization": False},
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        {"zero_optimization": {"stage": 3, "cpu_offload_param": True, "cpu_offload": False}},
    ],
    ids=str,
)
def test_old_forms_mean_what_deepspeed_takes_them_for(written: dict[str, Any], tmp_path: Path) -> None:
    ours = document_of(tmp_path, json.dumps(written))
    assert isinstance(ours["zero_optimization"], dict)
    means, meant = get_zero_config(ours), get_zero_config(dict(written))
    for setting in ("stage", "allgather_bucket_size", "offload_optimizer", "offload_param"):
        assert getattr(means, setting) == getattr(meant, setting)


def test_old_name_of_bf16_and_a_null_in_its_place_are_understood(tmp_path: Path) -> None:
    assert document_of(tmp_path, '{"bfloat16": {"enabled": true}}') == {"bf16": {"enabled": True}}
    assert document_of(tmp_path, '{"bf16": null}') == {}


def test_numbers_in_quotes_are_numbers_and_that_is_said(tmp_path: Path) -> None:
    written = {
        "train_micro_batch_size_per_gpu": "4",
        "gradient_clipping": "1.0",
        "optimizer": {"type": "Adam", "params": {"lr": "1e-5", "betas": ["0.9", "0.999"]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "100", "warmup_type": "log"}},
        "zero_optimization": {"stage": "2", "reduce_bucket_size": 5e8, "overlap_comm": "true"},
        "bf16": {"enabled": "true"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(written))
    file = read_ds_file(tmp_path / "ds.json")
    assert file.document == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_type": "log"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "overlap_comm": True},
        "bf16": {"enabled": True},
    }
    assert 'optimizer.params.lr "1e-5" is a number' in file.rewritten


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}',
            "optimizer.params.lr must be a number, not 'fast'",
        ),
        ('{"optimizer": {"type": "Adam", "params": {"weight_decay": [0.1]}}}', "optimizer.params.weight_decay must be"),
        ('{"scheduler": null}', "scheduler must be an object"),
        ('{"flops_profiler": true}', "flops_profiler must be an object"),
        ('{"wandb": false}', "wandb must be an object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 0, 1, 2 or 3, not 4"),
        ('{"train_batch_size": 0}', "train_batch_size must be a whole number from 1 on, not 0"),
        ('{"train_micro_batch_size_per_gpu": 1.5}', "train_micro_batch_size_per_gpu must be a whole number"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "fp16 and bf16 are both enabled"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "tensor_parallel.autotp_size has ranks share samples"),
        ('{"tensor_parallel": {"tp": {"tp_size": 4}}}', "tensor_parallel.tp.tp_size has ranks share samples"),
        ('{"sequence_parallel_size": 2}', "sequence_parallel_size has ranks share samples"),
        ('{"pipeline": {"stages": 2}}', "pipeline.stages has ranks share samples"),
        ('{"model_type": "llama", "hidden_size": 64}', "is the configuration of a model; give it as `model`"),
    ],
)
def test_mistake_in_a_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        document_of(tmp_path, text)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_that_deepspeed_does_not_know_are_named_with_what_is_near() -> None:
    document = {"zero_optimisation": {}, "gradient_cliping": 0.5, "quux": 1, "_comment": "ours", "bf16": {}}
    assert unknown_keys(document) == [
        "zero_optimisation (is zero_optimization meant?)",
        "gradient_cliping (is gradient_clipping meant?)",
        "quux",
    ]


class Asked(dict[str, Any]):
    """A document that remembers which keys it was asked for."""

    names: set[str]

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Asked":
        return self


def test_every_key_that_deepspeed_looks_for_is_known() -> None:
    document = Asked({"train_batch_size": 1})
    document.names = set()
    DeepSpeedConfig(document)
    assert len(document.names) > 50
    assert document.names - KNOWN_KEYS == set()


def test_long_text_that_is_no_json_is_no_configuration() -> None:
    with pytest.raises(ValueError):
        parsed("{a: 1\n" * 200_000)
