"""Four ranks that train a small GPT-2 under ZeRO-3 with some knobs, and tell what their engines are made of.

python four_ranks.py FOLDER TRAININGS, the last as JSON: knobs by the name of a training. They run one after the other,
each in four new processes, which are forked from this one: it has imported what they need. The document of each rank is
FOLDER/NAME.RANK.json, and what it prints FOLDER/NAME.RANK.log.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.rank.distributed import skip_unused_ops
from ds_tune.objectives.rank.knobs import apply_to_model, configure_model
from ds_tune.objectives.rank.model import build_model
from ds_tune.objectives.rank.ops import import_muon
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

RANKS = 4


def train(rank: int, rendezvous: Path, result: Path, knobs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    store = torch.distributed.FileStore(str(rendezvous), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    skip_unused_ops()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=16, dtype="fp32")
    config = TrialConfig(zero_stage=3, micro_batch_size=2, gradient_accumulation_steps=1, **knobs)
    ds_config = deepspeed_config(config, workload, ranks=RANKS, device="cpu")
    # By default parameters as small as these stay gathered, and nothing would be seen of gathering them.
    for setting in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
        ds_config["zero_optimization"][f"stage3_{setting}"] = 0
    described = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=501, use_cache=False)
    model = build_model(workload, configure_model(described, config.model_knobs), ds_config, torch.device("cpu"))
    apply_to_model(model, config.model_knobs)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    ids = torch.randint(501, (2, 16), generator=torch.Generator().manual_seed(rank))
    losses = []
    for _ in range(3):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    # A group's copy is made when the forward pass lets a parameter go, and forgotten when a step has changed it.
    loss = engine(input_ids=ids, labels=ids).loss
    weight = model.transformer.h[0].mlp.c_fc.weight
    copy = weight.ds_secondary_tensor
    document = {
        "losses": losses,
        "elements": weight.ds_numel,
        "partition": weight.ds_tensor.numel(),
        "group_partition": copy.numel() if copy is not None else None,
        "group_size": engine.zero_hpz_partition_size(),
    }
    engine.backward(loss)
    result.write_text(json.dumps(document))
    torch.distributed.barrier()


def fork(name: str, rank: int, folder: Path, knobs: dict[str, Any]) -> int:
    """One rank's process; its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"{name}.{rank}.log", os.O_WRONLY | os.O_CREAT)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        train(rank, folder / f"{name}.rendezvous", folder / f"{name}.{rank}.json", knobs)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def main(folder: str, trainings: str) -> int:
    import_muon({})
    for name, knobs in json.loads(trainings).items():
        ranks = {fork(name, rank, Path(folder), knobs) for rank in range(RANKS)}
        while ranks:
            process, status = os.wait()
            ranks.discard(process)
            if status:
                # Its peers would wait for it for ever; whoever started this one ends all of its group.
                print(f"a rank of {name} ended with status {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
