"""A plain DeepSpeed training script: what `cmd_optimal.txt` runs, and a check of what ds-tune reports.

    deepspeed --module objectives.train --model gpt2-xl --seq-len 1024 \\
        --deepspeed --deepspeed_config autotuning_results/ds_config_optimal.json

It trains as many scripts do, with a loop of its own and a wall clock around whole optimizer steps, and shares
with the tuner only the model and the data. It prints the samples per second it reached.
"""

import argparse
import json
import os
import time
from pathlib import Path

import deepspeed
import torch

from objectives.rank.data import batches, load_blocks
from objectives.rank.distributed import skip_unused_ops
from objectives.rank.model import build_model, load_config
from objectives.workload import Workload


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="objectives.train", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-xl", help="as for ds-tune")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a sample")
    parser.add_argument("--dataset", help="local files or a hub id; synthetic tokens without it")
    parser.add_argument("--tokenizer", help="folder or hub id; the model's own without it")
    parser.add_argument("--pretrained", action="store_true", help="load the model's weights")
    parser.add_argument("--warmup-steps", type=int, default=6, help="optimizer steps before the clock starts")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")), help=argparse.SUPPRESS
    )
    deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    ds_config = json.loads(Path(arguments.deepspeed_config).read_text())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(arguments.local_rank)
        device = torch.device("cuda", arguments.local_rank)
    skip_unused_ops()
    deepspeed.init_distributed()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    dtype = next((name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "fp32")
    workload = Workload(
        model=arguments.model,
        seq_len=arguments.seq_len,
        dtype=dtype,
        pretrained=arguments.pretrained,
        dataset=arguments.dataset,
        tokenizer=arguments.tokenizer,
    )
    model_config = load_config(workload)
    model = build_model(workload, model_config, ds_config, device)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    blocks = load_blocks(workload, model_config.get_text_config().vocab_size)
    micro_batch_size = engine.train_micro_batch_size_per_gpu()
    loader = batches(blocks, micro_batch_size, rank=rank, ranks=ranks, pin=device.type == "cuda")

    def steps_taken() -> int:
        return int(engine.global_steps - engine.skipped_steps)

    def train(steps: int) -> float:
        """Seconds for that many optimizer steps; those that overflow skipped are run again."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        torch.distributed.barrier()
        started = time.perf_counter()
        goal = steps_taken() + steps
        while steps_taken() < goal:
            batch = {key: tensor.to(device, non_blocking=True) for key, tensor in next(loader).items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    train(arguments.warmup_steps)
    seconds = train(arguments.steps)
    rate = engine.train_batch_size() * arguments.steps / seconds
    if rank == 0:
        print(
            f"{rate:.3f} samples/s over {arguments.steps} steps of {engine.train_batch_size()} samples",
            flush=True,
        )
        if arguments.json is not None:
            document = {"samples_per_second": rate, "steps": arguments.steps, "seconds": seconds}
            arguments.json.write_text(json.dumps(document))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
