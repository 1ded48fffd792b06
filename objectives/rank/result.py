"""Result of a timed trial on this rank."""

from ds_tune.objectives.rank.device import Meter
from ds_tune.objectives.rank.session import TimingSession
from ds_tune.objectives.running.protocol import RankResult


def timed_result(
    session: TimingSession,
    meter: Meter,
    gradient_accumulation_steps: int,
    *,
    setup_seconds: float,
    model_parameters: int,
    flops_per_sample: float,
    tokens_per_sample: float | None = None,
    deepspeed_samples_per_second: float | None = None,
) -> RankResult:
    """Result of a session that has ended, with the memory that the meter has seen; `Measurement` says what each is."""
    timed = session.timed
    return RankResult(
        step_seconds=tuple(timed.step_seconds),
        step_ci95_seconds=timed.ci95,
        from_parts=timed.parts,
        forward_seconds=timed.mean("forward_seconds"),
        backward_seconds=timed.mean("backward_seconds"),
        optimizer_seconds=timed.mean("optimizer_seconds"),
        warmup_step_seconds=tuple(step.seconds for step in [*timed.warmup, *timed.early]),
        first_steps_seconds=timed.first_steps_seconds(gradient_accumulation_steps),
        stopped_early=timed.stopped_early,
        drifting=timed.drifting,
        skipped_steps=session.skipped_steps,
        deepspeed_samples_per_second=deepspeed_samples_per_second,
        peak_memory_bytes=meter.peak_memory_bytes(),
        reserved_memory_bytes=meter.reserved_memory_bytes(),
        alloc_retries=meter.alloc_retries(),
        setup_seconds=setup_seconds,
        model_parameters=model_parameters,
        flops_per_sample=flops_per_sample,
        tokens_per_sample=tokens_per_sample,
    )
