"""Models as people have them: what `plan` says of them, and that it refuses what a study refuses."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.tuner.cli import main

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 128,
}
MIXTRAL = {
    **SIZES, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
SMALL = ["--max-micro-batch", "2", "--max-global-batch", "4"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes `model.json` into a folder of its own, in which the test then is."""
    monkeypatch.chdir(tmp_path)
    return lambda **fields: (tmp_path / "model.json").write_text(json.dumps(fields)) and None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
            'BartForConditionalGeneration is an encoder with a decoder, which is not trained here; to train its '
            'decoder alone, write "architectures": ["BartForCausalLM"] into its configuration',
        ),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "have no language-model head"),
        ({"model_type": "vit"}, "models of type vit have no language-model head"),
        ({"model_type": "baichuan", "auto_map": {"AutoConfig": "a.B"}, **SIZES}, "is its own (auto_map), no part of"),
        ({"auto_map": {"AutoModelForCausalLM": "a.B"}, **SIZES}, "is its own (auto_map), no part of transformers"),
        (
            {"model_type": "llama", "architectures": ["OddForCausalLM"], "auto_map": {"AutoModel": "a.B"}, **SIZES},
            "the code of OddForCausalLM is its own (auto_map)",
        ),
        ({"model_type": "nonesuch", **SIZES}, "cannot be loaded: "),
        ({"model_type": "roberta", "max_position_embeddings": 33, **SIZES}, "takes at most 31 positions"),
        ({"model_type": "camembert", "max_position_embeddings": 33, **SIZES}, "takes at most 31 positions"),
        ({"model_type": "bert", "max_position_embeddings": 31, **SIZES}, "takes at most 31 positions"),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 31}}, "takes at most 31 positions"),
        ({"model_type": "gpt_neox", **SIZES, "num_attention_heads": 3}, "cannot be "),
    ],
    ids=lambda each: each.get("model_type", "no type") if isinstance(each, dict) else "",
)  # fmt: skip
def test_a_plan_and_a_study_refuse_a_model_in_the_same_sentence(
    model: Callable[..., None], capsys: pytest.CaptureFixture[str], fields: dict[str, Any], sentence: str
) -> None:
    model(**fields)
    said = []
    for command in (["plan", "--hardware", "1xH100-80GB"], ["--gpus", "0", "--trials", "1"]):
        assert main([*command, "--model", "model.json", "--seq-len", "32", *SMALL]) == 2
        said.append(capsys.readouterr().err.strip())
    assert said[0] == said[1]
    assert sentence in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (MIXTRAL, "0.0516M parameters, of which a token uses 0.0332M; "),
        ({"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 128},
         "0.0214M parameters; "),
        ({"model_type": "bloom", "n_embed": 1024, "num_attention_heads": 16, "n_layer": 24}, "559M parameters; "),
        ({**SIZES, "model_type": "roberta", "max_position_embeddings": 34}, "M parameters; "),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], **SIZES},
         "Trained is LlamaForCausalLM: the configuration names LlamaForSequenceClassification"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"], **SIZES},
         "Trained is BertForMaskedLM: the configuration names BertForSequenceClassification"),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"], "d_model": 32, "decoder_attention_heads": 4,
          "vocab_size": 128}, "M parameters; "),
        ({"model_type": "falcon", "auto_map": {"AutoConfig": "a.B"}, "architectures": ["FalconForCausalLM"], **SIZES},
         "M parameters; "),
    ],
    ids=lambda each: each.get("model_type") if isinstance(each, dict) else "",
)  # fmt: skip
def test_a_plan_says_what_is_trained_and_how_many_parameters_it_has(
    model: Callable[..., None], capsys: pytest.CaptureFixture[str], fields: dict[str, Any], words: str
) -> None:
    model(**fields)
    assert main(["plan", "--hardware", "1xH100-80GB", "--model", "model.json", "--seq-len", "32", *SMALL]) == 0
    output = capsys.readouterr().out
    assert words in output
    assert "about" not in output.splitlines()[0]


def test_experts_that_no_token_goes_to_take_memory_and_no_time(
    model: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for experts in (8, 64):
        model(**MIXTRAL | {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": experts})
        command = ["plan", "--hardware", "1xH100-80GB", "--dtype", "bf16", "--model", "model.json", "--seq-len", "32"]
        assert main([*command, *SMALL, "--best", "10000", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        [row] = [row for row in document["fitting"] if row["name"] == "z0_gas1_tmbspg1"]
        found.append((document["model_parameters"], document["active_parameters"], row["memory_bytes"]))
    (few, active, memory), (many, still, more) = found
    assert many > 6 * few
    assert still == pytest.approx(active, rel=0.02)  # routers have a row for each expert
    assert more["optimizer_states"] == 12 * many
    assert more["activations"] == pytest.approx(memory["activations"], rel=0.02)


@pytest.mark.slow
def test_a_mixture_of_experts_trains_under_zero_3_on_two_ranks(
    model: Callable[..., None], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    model(**MIXTRAL)
    (tmp_path / "space.toml").write_text(
        "[fixed]\nzero_stage = 3\nmicro_batch_size = 1\ngradient_accumulation_steps = 1\n"
    )
    # By default parameters as small as these stay gathered, and nothing would be seen of gathering them.
    gathered = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": gathered}))
    words = ["--gpus", "0", "--model", "model.json", "--seq-len", "32", "--space", "space.toml"]
    finished = command(*words, "--ds-config", "ds.json", "--trials", "1", "--no-verify")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = next(tmp_path.glob("*/summary.md")).read_text()
    assert "- model: 0.0516M parameters, of which a token uses 0.0332M" in summary
