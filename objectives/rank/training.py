"""One timed trial on this rank: configuration, model, engine, warm-up, timed steps."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from ds_tune.objectives.rank.data import batches
from ds_tune.objectives.rank.engine import EngineSlot, predict_step_seconds
from ds_tune.objectives.rank.fed import FedSteps
from ds_tune.objectives.rank.loop import Batch, TrainingLoop
from ds_tune.objectives.rank.micro_batch import MicroBatch
from ds_tune.objectives.rank.model import flops_per_sample
from ds_tune.objectives.rank.padded import padded_batches
from ds_tune.objectives.rank.resources import RankResources
from ds_tune.objectives.rank.result import timed_result
from ds_tune.objectives.rank.session import TimingSession
from ds_tune.objectives.rank.trainers import BUILDERS
from ds_tune.objectives.running.protocol import DEEPSPEED, RankResult, Time
from ds_tune.objectives.timing.schedule import TIMED, Timing
from ds_tune.objectives.trial import TrialConfig


def run_trial(command: Time, rank: RankResources, slot: EngineSlot) -> RankResult:
    """Trains with one configuration and times it."""
    started = time.perf_counter()
    config, meter = command.config, rank.meter
    engine, parameters = BUILDERS[rank.trainer](config, rank, slot)
    rank.progress.enter("data")
    micro_batches = micro_batches_of(config, rank)
    fed = None if rank.samples is None else fed_steps(config, rank)
    setup_seconds = time.perf_counter() - started

    gas = config.gradient_accumulation_steps
    tokens = rank.workload.counted_tokens_per_sample or rank.workload.seq_len
    longest = rank.workload.tokens_per_sample / tokens
    best = command.best_samples_per_second
    timing = Timing(
        plan=command.plan,
        zero_stage=config.zero_stage,
        compile=config.compile,
        gradient_accumulation_steps=gas,
        predicted_step_seconds=longest * predict_step_seconds(config, rank, parameters, command.seconds_per_sample),
        best_step_seconds=config.global_batch_size(rank.machine.ranks) / best if best else None,
        agree=rank.peers.slowest,
        may_shorten=fed is None,  # a short step would have other samples than a whole one
    )
    session = TimingSession(timing, meter, rank.peers, rank.progress, notes=fed)
    loop = TrainingLoop(
        engine,
        micro_batches,
        rank.device,
        enter=session.enter,
        micro_step_done=session.micro_step_done,
        on_batch=None if fed is None else lambda batch: fed.fed(MicroBatch((), batch, ())),
    )
    deepspeed_timer: DeepSpeedTimer | None = None
    goes_on = True
    while goes_on:
        if (
            deepspeed_timer is None
            and rank.trainer == DEEPSPEED
            and session.phase == TIMED
            and session.micro_steps == gas
        ):
            deepspeed_timer = DeepSpeedTimer(engine)
        skipped = loop.step(session.micro_steps)
        if fed is not None:
            fed.step_done()
        goes_on = session.step_done(skipped=skipped)
    whole = deepspeed_timer if session.timed.parts is None else None
    return timed_result(
        session,
        meter,
        gas,
        setup_seconds=setup_seconds,
        model_parameters=parameters,
        flops_per_sample=flops_per_sample(rank.model_config, parameters, round(tokens)),
        tokens_per_sample=None if fed is None else tokens,
        deepspeed_samples_per_second=whole.samples_per_second() if whole is not None else None,
    )


def micro_batches_of(config: TrialConfig, rank: RankResources) -> Iterator[Batch]:
    """Micro-batches that a trial is fed: of blocks, or of padded samples."""
    number, ranks, pin = torch.distributed.get_rank(), rank.machine.ranks, rank.device.type == "cuda"
    size = config.micro_batch_size
    if rank.samples is None:
        return batches(rank.blocks, size, rank=number, ranks=ranks, pin=pin)
    gas = config.gradient_accumulation_steps
    return padded_batches(rank.samples, size, gas, rank=number, ranks=ranks, pin=pin)


def fed_steps(config: TrialConfig, rank: RankResources) -> FedSteps:
    """Count of the tokens, padding apart, that a trial's steps are fed."""
    return FedSteps(
        rank.peers,
        samples_per_step=config.global_batch_size(rank.machine.ranks),
        tokens_per_sample=rank.workload.counted_tokens_per_sample,
        is_packed=False,
    )


class DeepSpeedTimer:
    """Throughput of the whole steps from now on by DeepSpeed's own ThroughputTimer."""

    def __init__(self, engine: Any) -> None:
        self._timer = engine.tput_timer
        # Its first steps are not in its seconds, and those of a warm-up may have fewer samples than it thinks.
        self._steps_before = max(self._timer.global_step_count, self._timer.start_step)
        self._seconds_before = self._timer.total_elapsed_time

    def samples_per_second(self) -> float | None:
        """None where it has timed no step yet, or the user has switched it off."""
        steps = self._timer.global_step_count - self._steps_before
        seconds = self._timer.total_elapsed_time - self._seconds_before
        return float(self._timer.batch_size * steps / seconds) if steps > 0 and seconds > 0 else None
