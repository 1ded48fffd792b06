"""Options of `tune compare`, and the request that they make."""

import argparse
from pathlib import Path

from ds_tune.objectives.machine import DEFAULT_CPU_RANKS
from ds_tune.objectives.workload.huggingface import DTYPES, SHIPPED_MODELS
from ds_tune.tuner.arguments import Parser, add_memory_cap, add_output_options, filled, positive, whole
from ds_tune.tuner.comparison.request import (
    DEFAULT_COMPARISON,
    DEFAULT_ROUNDS,
    DEFAULT_SPEED_TRIALS,
    CompareRequest,
)
from ds_tune.tuner.request import DEFAULT_TRIAL_SECONDS, DEFAULT_TRIALS, TuneRequest, as_fields

OF_THE_COMPARISON = ("models", "speed_trials", "rounds", "free_only", "json", "quiet", "script")


def compare_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tune compare",
        description="Compares training without DeepSpeed, with DeepSpeed tuned by hand, with your configuration "
        "(--ds-config), and with what ds-tune finds: at free batch sizes, then at one global batch.",
        epilog="For built-in models and those of transformers; a training script of your own and DeepSpeed's autotuner "
        "are not among the rows (benchmarks/head_to_head.py has the latter). The same command again resumes, also "
        "with more models, rounds or trials.",
    )
    study = parser.add_argument_group("comparison")
    study.add_argument(
        "--results",
        type=Path,
        default=Path(DEFAULT_COMPARISON),
        metavar="DIR",
        help="folder for the results (default %(default)s)",
    )
    study.add_argument(
        "--rounds",
        type=positive,
        default=DEFAULT_ROUNDS,
        metavar="N",
        help="runs of each choice in fresh processes (default %(default)s)",
    )
    study.add_argument(
        "--trials",
        type=positive,
        default=DEFAULT_TRIALS,
        metavar="N",
        help="most trials of ds-tune's core search (default %(default)s)",
    )
    study.add_argument(
        "--speed-trials",
        type=positive,
        default=DEFAULT_SPEED_TRIALS,
        metavar="N",
        help="most trials of its wider search (default %(default)s)",
    )
    study.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="spare the studies their own verification and comparison of losses; all choices run again in any case",
    )
    work = parser.add_argument_group("what is trained")
    work.add_argument(
        "--models",
        nargs="+",
        type=filled,
        default=(),
        metavar="M",
        help=f"each {', '.join(SHIPPED_MODELS)}, a folder or config.json, or a hub id (default gpt2-xl; on CPU "
        "gpt2-nano)",
    )
    work.add_argument("--dtype", choices=DTYPES, help="precision (default fp16; on CPU fp32)")
    work.add_argument("--seq-len", type=positive, metavar="S", help="tokens a sample (default 1024; on CPU 128)")
    work.add_argument("--dataset", metavar="FILES", help="as for tune (default: synthetic tokens)")
    work.add_argument("--text-column", metavar="NAME", help="column of --dataset to train on (default: found out)")
    work.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="cut the samples of --dataset, joined, into full sequences, instead of padding each (default)",
    )
    work.add_argument("--tokenizer", metavar="NAME", help="folder or hub id of the tokenizer for --dataset")
    work.add_argument("--pretrained", action="store_true", help="load the models' weights")
    work.add_argument(
        "--ds-config",
        type=Path,
        metavar="FILE",
        help="your DeepSpeed configuration: a row as it is, and ds-tune's base",
    )
    space = parser.add_argument_group("batch sizes")
    space.add_argument("--max-micro-batch", type=positive, metavar="B", help="largest mbs (default 64; on CPU 16)")
    space.add_argument(
        "--max-global-batch",
        type=positive,
        metavar="B",
        help="largest mbs × gas × ranks at free batch sizes (default 128 a GPU; 32 a CPU rank)",
    )
    batch = space.add_mutually_exclusive_group()
    batch.add_argument(
        "--global-batch",
        type=positive,
        metavar="B",
        help="global batch of the second table (default: that of the hand-tuned row)",
    )
    batch.add_argument("--free-only", action="store_true", help="leave out the second table")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpus", type=whole, metavar="N", help="use the first N visible GPUs (default all; 0 runs on the CPU)"
    )
    machine.add_argument(
        "--ranks", type=positive, metavar="N", help=f"ranks to start on the CPU (default {DEFAULT_CPU_RANKS})"
    )
    add_memory_cap(machine)
    machine.add_argument(
        "--trial-timeout",
        type=positive,
        metavar="S",
        help=f"kill a run after S seconds (default {DEFAULT_TRIAL_SECONDS:.0f})",
    )
    add_output_options(parser)
    return parser


def compare_request(arguments: argparse.Namespace) -> CompareRequest:
    """The request that the options make.

    Raises:
        UsageError: they do not go together.
    """
    values = {name: value for name, value in vars(arguments).items() if name not in OF_THE_COMPARISON}
    # A request has one of the two: each table has its own.
    most, one = values.pop("max_global_batch"), values.pop("global_batch")
    return CompareRequest(
        models=tuple(arguments.models),
        request=TuneRequest(**as_fields({**values, "max_global_batch": most})),
        global_batch=one,
        speed_trials=arguments.speed_trials,
        rounds=arguments.rounds,
        free_only=arguments.free_only,
    )
