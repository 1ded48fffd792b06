"""A plain DeepSpeed training script: what `cmd_optimal.txt` runs, and a check of what ds-tune reports.

    deepspeed --module ds_tune.objectives.rank.train --model gpt2-xl --seq-len 1024 \\
        --deepspeed --deepspeed_config autotuning_results/ds_config_optimal.json

It trains as many scripts do, with a loop of its own and a wall clock around whole optimizer steps, and shares
with the tuner only the model and the data. It prints the samples per second it reached. DeepSpeed's own autotuner can
run it too: it passes the configuration itself, base64-encoded, in place of a file, and its engine ends the run.
"""

import argparse
import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ds_tune.objectives.ds_config import dtype_of
from ds_tune.objectives.ds_file import parsed
from ds_tune.objectives.rank.data import batches, load_blocks
from ds_tune.objectives.rank.distributed import skip_unused_ops
from ds_tune.objectives.rank.knobs import apply_to_engine, apply_to_model, configure_model, parse_knobs
from ds_tune.objectives.rank.loop import TrainingLoop
from ds_tune.objectives.rank.model import build_model
from ds_tune.objectives.rank.model_config import load_config
from ds_tune.objectives.rank.padded import load_samples, padded_batches
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ds_tune.objectives.rank.train", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-xl", help="as for ds-tune")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a sample")
    parser.add_argument("--dataset", help="local files or a hub id; synthetic tokens without it")
    parser.add_argument("--text-column", help="column of it to train on; found out without it")
    parser.add_argument(
        "--no-packing", action="store_false", dest="packing", help="pad samples instead of joining them"
    )
    parser.add_argument("--tokenizer", help="folder or hub id; the model's own without it")
    parser.add_argument("--pretrained", action="store_true", help="load the model's weights")
    parser.add_argument(
        "--knob", action="append", default=[], metavar="NAME=VALUE", help="of the model, such as compile=blocks"
    )
    parser.add_argument("--warmup-steps", type=int, default=6, help="optimizer steps before the clock starts")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")), help=argparse.SUPPRESS
    )
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    try:
        arguments.ds_config = load_ds_config(arguments.deepspeed_config)
    except ValueError as error:
        parser.error(str(error))
    try:
        arguments.knobs = parse_knobs(arguments.knob)
    except ValueError as error:
        parser.error(f"--knob {error}")
    return arguments


def load_ds_config(argument: str | None) -> dict[str, Any]:
    """The DeepSpeed configuration that `--deepspeed_config` names, or is: base64 of the JSON, as DeepSpeed takes it.

    Raises:
        ValueError: it is neither, or no JSON object; the text is for the user.
    """
    if argument is None:
        raise ValueError("--deepspeed_config FILE is needed: the DeepSpeed configuration to train with")
    is_file = os.path.isfile(argument)  # unlike Path.is_file it bears a name as long as an encoded configuration
    try:
        text = Path(argument).read_text() if is_file else base64.b64decode(argument, b"-_", validate=True).decode()
        document = parsed(text)
    except OSError as error:
        raise ValueError(f"--deepspeed_config {argument} cannot be read ({error.strerror})") from error
    except ValueError as error:
        if is_file:
            raise ValueError(f"--deepspeed_config {argument} is not JSON ({error})") from error
        raise ValueError(f"--deepspeed_config {argument[:80]}: no such file, and no base64 of JSON either") from error
    if not isinstance(document, dict):
        raise ValueError(f"--deepspeed_config {argument[:80]} must hold a JSON object")
    return document


def main() -> None:
    arguments = parse_arguments()
    ds_config: dict[str, Any] = arguments.ds_config
    # DeepSpeed's default, stated for those who read it from here.
    ds_config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    device = torch.device("cpu")
    if get_accelerator().device_name() == "cuda":  # DS_ACCELERATOR=cpu means it, whatever GPUs there are
        torch.cuda.set_device(arguments.local_rank)
        device = torch.device("cuda", arguments.local_rank)
    skip_unused_ops()
    deepspeed.init_distributed()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    workload = HuggingFaceWorkload(
        model=arguments.model,
        seq_len=arguments.seq_len,
        dtype=dtype_of(ds_config),
        pretrained=arguments.pretrained,
        dataset=arguments.dataset,
        text_column=arguments.text_column,
        packing=arguments.packing,
        tokenizer=arguments.tokenizer,
    )
    model_config = load_config(workload)
    model = build_model(workload, configure_model(model_config, arguments.knobs), ds_config, device)
    apply_to_model(model, arguments.knobs)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    apply_to_engine(engine, arguments.knobs)
    vocab_size = model_config.get_text_config().vocab_size
    size, pin = engine.train_micro_batch_size_per_gpu(), device.type == "cuda"
    if workload.packing:
        loader = batches(load_blocks(workload, vocab_size), size, rank=rank, ranks=ranks, pin=pin)
    else:
        loader = padded_batches(
            load_samples(workload, vocab_size),
            size,
            engine.gradient_accumulation_steps(),
            rank=rank,
            ranks=ranks,
            pin=pin,
        )

    loop = TrainingLoop(engine, loader, device)

    def train(steps: int) -> float:
        """Seconds for that many optimizer steps; those that overflow skipped are run again."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        torch.distributed.barrier()
        started = time.perf_counter()
        taken = 0
        while taken < steps:
            taken += not loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    try:
        train(arguments.warmup_steps)
        seconds = train(arguments.steps)
    except SystemExit:  # under DeepSpeed's autotuner the engine ends the process once it has written its figures
        torch.distributed.destroy_process_group()
        raise
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
