"""What a block is counted to keep for the backward pass, beside what real blocks keep.

Dropout is off: where it is on, a CPU keeps its masks in another type than a GPU.
"""

import itertools
from typing import Any

import pytest
import torch
import transformers

from ds_tune.objectives.cost_model.architecture import architecture_from_config
from ds_tune.objectives.cost_model.block_tensors import tensors_of_a_block

SEQ_LEN, HIDDEN = 64, 128
WIDTH = 2
"""Of bf16, in bytes."""

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": 3 * HIDDEN, "vocab_size": 100}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": 4, "vocab_size": 100, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"model_type": "llama", **SIZES},
    "llama, grouped queries": {"model_type": "llama", **SIZES, "num_key_value_heads": 2},
    "bert": {"model_type": "bert", **SIZES, **NO_DROPOUT},
    "deberta-v2": {"model_type": "deberta-v2", **SIZES, **NO_DROPOUT, "relative_attention": True,
                   "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    "deberta-v2, of its own keys": {"model_type": "deberta-v2", **SIZES, **NO_DROPOUT, "relative_attention": True,
                                    "max_relative_positions": 24, "pos_att_type": ["c2p", "p2c"]},
}  # fmt: skip


def kept_bytes(fields: dict[str, Any], *, layers: int, batch: int) -> int:
    """Bytes that the forward pass keeps beside parameters and buffers."""
    more = {key: value for key, value in fields.items() if key != "model_type"}
    more |= {"n_layer": layers} if fields["model_type"] == "gpt2" else {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(fields["model_type"], **more)
    model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16).train()
    own = {each.untyped_storage().data_ptr() for each in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = model(input_ids=torch.ones(batch, SEQ_LEN, dtype=torch.long), use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_a_block_keeps_what_is_counted(fields: dict[str, Any]) -> None:
    by_layers = [
        kept_bytes(fields, layers=layers, batch=4) - kept_bytes(fields, layers=layers, batch=2) for layers in (2, 3)
    ]
    of_a_block = (by_layers[1] - by_layers[0]) / (2 * SEQ_LEN * HIDDEN * WIDTH)
    architecture = architecture_from_config({"num_hidden_layers": 2, **fields}, "m")
    counted = tensors_of_a_block(architecture, seq_len=SEQ_LEN, width=WIDTH, attention="sdpa", compiled=False)
    assert counted == pytest.approx(of_a_block, rel=0.03)
