"""Fastest configuration of a search, as far as it and the runs after it tell: the candidates, and how they rank."""

import dataclasses
from collections.abc import Collection, Mapping

from ds_tune.storage.finalists import Finalist, compare, log_rate, undisturbed_log_rate, verified_rate

CANDIDATES = 3
SURE_CANDIDATES = 2
"""The fastest of a search is the one that was also lucky: what it is really ahead of the next is seen beside it."""
CLOSE = 0.05
"""A third that is this much slower than the fastest does not catch up by the noise of one run."""
CONTENDERS = 5
"""Where something else uses the machine, the fastest of nine trials may have looked as slow as the fifth."""

SHORT_OF_MEMORY = 0.9
"""Fraction of the memory of a rank beyond which a configuration may run out in a long training."""
FELT_MEMORY = 0.01
"""Fraction of the memory of a rank that is worth choosing a configuration for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """State of a verification: whom to name, and what is known of the others."""

    leader: str
    """Name of the configuration to take."""
    level: tuple[str, ...] = ()
    """Configurations shown to be within `storage.finalists.LEVEL` of the fastest, which may be the leader or one of
    these."""
    unsettled: tuple[str, ...] = ()
    """Configurations that the runs so far cannot tell from the fastest."""


def contenders(field: Mapping[str, Finalist]) -> list[str]:
    """Names of those that may be the fastest where all have been disturbed: the first `CONTENDERS` by the fastest steps
    of each in the search."""
    return sorted(field, key=lambda name: -undisturbed_log_rate(field[name].search))[:CONTENDERS]


def candidates(field: Mapping[str, Finalist], *, busy: bool, promoted: Collection[str] = ()) -> list[str]:
    """Names of those that may be the fastest, the fastest of the search first: two, or three that are close; more where
    something else uses the machine.

    Args:
        field: complete trials by the configuration's name.
        promoted: those that an ablation found to be faster than the winner, which are candidates, too.
    """
    names = sorted(field, key=lambda name: -log_rate(field[name].search))
    if busy:
        among = contenders(field)
        chosen = [name for name in names if name in among]
    else:
        rates = [field[name].search.samples_per_second for name in names[:CANDIDATES]]
        close = sum(rate >= rates[0] * (1 - CLOSE) for rate in rates)
        chosen = names[: max(close, SURE_CANDIDATES)]
    return [*chosen, *(name for name in names if name in promoted and name not in chosen)]


def judge(field: Mapping[str, Finalist], capacity_bytes: int, *, run_noise: float | None = None) -> Verdict:
    """Ranks candidates that have verification runs, by their verified rates.

    The fastest is the leader, unless one that is level with it needs clearly less memory. Where the fastest is short of
    memory, those that cannot be told from it may take its place, too.

    Args:
        field: candidates by name, at least one.
        capacity_bytes: of a rank.
        run_noise: see `disturbed_run_noise`; None on a quiet machine.
    """
    fastest = max(field, key=lambda name: verified_rate(field[name], run_noise=run_noise).samples_per_second)
    level: list[str] = []
    unsettled: list[str] = []
    for name in field:
        comparison = compare(field[fastest], field[name], run_noise=run_noise)
        if name == fastest or comparison.is_faster:
            continue
        (level if comparison.is_level else unsettled).append(name)
    peaks = {name: max(run.peak_memory_bytes for run in finalist.runs) for name, finalist in field.items()}
    saving = list(level)
    if peaks[fastest] > SHORT_OF_MEMORY * capacity_bytes:
        saving += [name for name in unsettled if peaks[name] <= SHORT_OF_MEMORY * capacity_bytes]
    saving = [name for name in saving if peaks[name] < peaks[fastest] - FELT_MEMORY * capacity_bytes]
    leader = min(saving, key=peaks.__getitem__, default=fastest)
    return Verdict(
        leader=leader,
        level=tuple(name for name in (fastest, *level) if name != leader and leader not in unsettled),
        unsettled=tuple(name for name in (fastest, *level) if leader in unsettled)
        + tuple(name for name in unsettled if name != leader),
    )
