"""What a person who tunes by hand tries, one run after another."""

from ds_tune.objectives.trial import FailureKind, Outcome, TrialConfig
from ds_tune.tuner.comparison.sweep import Sweep, fastest_first
from ds_tune.tuner.limits import Limits

from .conftest import RANKS, config, failed, ran


def limits(*, global_batch: int | None = None, max_global_batch: int = 64) -> Limits:
    return Limits(ranks=RANKS, max_micro_batch=8, max_global_batch=max_global_batch, global_batch=global_batch)


def played(sweep: Sweep, fitting: int, known: dict[str, Outcome] | None = None) -> list[TrialConfig]:
    """Configurations that a sweep runs where micro-batches up to a size fit."""
    known, run = dict(known or {}), []
    while (following := sweep.next(known)) is not None:
        run.append(following)
        known[following.name] = ran(following, 10) if following.micro_batch_size <= fitting else failed()
    return run


def test_micro_batch_is_doubled_at_each_stage_until_memory_is_out() -> None:
    run = played(Sweep(stages=(1, 3), limits=limits()), fitting=2)
    assert run == [config(1, 1), config(1, 2), config(1, 4), config(3, 1), config(3, 2), config(3, 4)]


def test_micro_batch_is_doubled_no_further_than_the_limits() -> None:
    assert played(Sweep(stages=(0,), limits=limits(max_global_batch=8)), fitting=99) == [
        config(0, 1),
        config(0, 2),
        config(0, 4),
    ]


def test_at_one_global_batch_accumulation_follows_from_the_micro_batch() -> None:
    run = played(Sweep(stages=(0,), limits=limits(global_batch=12)), fitting=99)
    assert run == [config(0, 1, 6), config(0, 2, 3)]


def test_micro_batch_that_ran_out_of_memory_alone_is_not_tried_with_accumulation() -> None:
    known: dict[str, Outcome] = {config(0, 2).name: failed()}
    assert played(Sweep(stages=(0,), limits=limits(global_batch=8)), fitting=99, known=known) == [config(0, 1, 4)]


def test_crash_ends_a_stage_as_running_out_of_memory_does() -> None:
    known: dict[str, Outcome] = {config(0, 1).name: failed(FailureKind.CRASH)}
    assert played(Sweep(stages=(0, 1), limits=limits()), fitting=0, known=known) == [config(1, 1)]


def test_fastest_of_a_sweep_need_not_be_the_largest() -> None:
    known: dict[str, Outcome] = {"z0_gas1_tmbspg1": ran(config(0, 1), 20), "z0_gas1_tmbspg2": ran(config(0, 2), 15)}
    configs = [config(0, 1), config(0, 2), config(0, 4)]
    assert [each for each, _ in fastest_first(configs, known)] == [config(0, 1), config(0, 2)]
