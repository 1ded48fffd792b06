"""Which configuration to run next, given what the cost model and the trials say.

The one with the best odds to be as good as the best there is, where any has odds to speak of: what is asked for is a
good configuration soon, and of boxes one of which holds the prize one opens the likeliest for its cost first. Otherwise
the one with the most to gain: expected improvement × probability of fitting (Schonlau et al. 1998). Both are averaged
over how far the cost model is trusted, and weigh the seconds that the trial is predicted to take. Pure arithmetic on a
`Grid`; `tuner.sampler` ties it to Optuna.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from ds_tune.objectives.cost_model.calibration import Observation, RatePosterior, calibrate_rates
from ds_tune.objectives.cost_model.forecast import Excluded, Forecast
from ds_tune.objectives.cost_model.gaussian_process import normal_cdf
from ds_tune.objectives.cost_model.grid import Floats
from ds_tune.objectives.cost_model.memory_calibration import MemoryPosterior, calibrate_memory
from ds_tune.objectives.cost_model.prior import Prior
from ds_tune.objectives.timing.step_parts import FEWEST_MICRO_STEPS
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import TrialConfig

ENOUGH_GAIN = 0.003
"""Stop when no candidate's expected gain reaches this. Replayed on six recorded surfaces, the best that is left out is
0.0 to 0.4% faster on average (benchmarks/search.py)."""

COST_POWER = 0.2
"""How much a trial's seconds weigh: 0 not at all, 1 for gain a second. A long trial says more about the others, most of
which are as long. Recorded surfaces cannot tell 0 from 0.5; it keeps compiling, which takes minutes, for what gains."""

AS_GOOD = 0.02
"""Relative difference from the best within which a configuration is as good."""

ODDS_TO_SPEAK_OF = 0.1
"""Where no configuration is so likely to be as good as the best, the most to gain decides."""

DRAWS = 1000
CONTENDERS = 200
"""Number of configurations whose odds are drawn, those that may turn out fastest; the rest have none."""

FIT_POWER = 3
"""How much the probability of fitting weighs; 1 would be the plain expectation, but a trial that runs out of memory
also leaves a person with one result fewer."""

UNLIKELY_TO_FIT = 0.2
"""Probability of fitting below which a configuration is not what a search hopes for."""

BASELINE_FITS = 0.7
"""A baseline with less waits until others have been tried: what a search begins with is to run. Under 32 GiB one GPU
ran the untuned training of GPT2-xl out of memory in four stages before it offloaded."""

TWIN_FITS = 0.5
"""ZeRO-3 is not needed for what is so likely to fit in a lower stage."""

HOPELESS_STAGE_3 = 1.25
"""Ratio of the best rate so far to a ZeRO-3 configuration's predicted one, beyond which that is not worth a trial. On
two H200s it was 66 to 52 samples/s, and stage 3 took 19 to 30 s of a search's 59 to 79."""

SETUP_SECONDS = (0.6, 0.6, 0.6, 3.5)
"""Seconds that a warm trial takes besides its steps, by ZeRO stage (measured on an H200 with GPT2-xl)."""

COMPILATION_SECONDS = {"model": 95.0, "deepcompile": 130.0}
"""Seconds that compiling a whole model adds (measured with GPT2-xl on an H100, DeepCompile at ZeRO-2)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The next configuration to run."""

    config: TrialConfig
    forecast: Forecast
    expected_gain: float
    """Relative improvement over the best so far that running it is expected to bring, at the most."""


class Proposer:
    """Beliefs about the configurations of a space, and the choice among them."""

    def __init__(
        self,
        prior: Prior,
        configs: Sequence[TrialConfig],
        *,
        known: Sequence[TrialConfig] = (),
        plan: StepPlan | None = None,
    ) -> None:
        """
        Args:
            configs: what may be proposed.
            known: what else there are observations of.
        """
        self._prior = prior
        self._proposable = len(configs)
        proposable = set(configs)
        configs = [*configs, *(config for config in dict.fromkeys(known) if config not in proposable)]
        self.grid = prior.grid(configs)
        self._row = {config: row for row, config in enumerate(self.grid.configs)}
        self._capacity_bytes = float(prior.hardware.capacity_bytes)
        self._outside_bytes = prior.hardware.outside_bytes
        self._twins = _twins(self.grid.configs)
        self._ranks = prior.hardware.ranks
        self._seconds = _trial_seconds(self.grid.log_rate, configs, prior.hardware.ranks, plan or StepPlan())

    def row(self, config: TrialConfig) -> int | None:
        """Where a configuration stands in the grid; None if it is not in the space."""
        return self._row.get(config)

    def beliefs(self, observations: Sequence[Observation]) -> tuple[RatePosterior, MemoryPosterior]:
        """Beliefs about the whole grid after these observations."""
        return (
            calibrate_rates(self.grid, observations, self._prior.error_priors),
            calibrate_memory(
                self.grid,
                observations,
                self._capacity_bytes,
                outside_bytes=self._outside_bytes,
                errors=self._prior.memory_errors,
            ),
        )

    def propose(
        self, observations: Sequence[Observation], taken: Collection[int], random: np.random.Generator
    ) -> Proposal | None:
        """The configuration to run next; None when no untaken one can fit.

        Args:
            taken: rows that have been, are being or will be run.
            random: only decides between configurations that are level.
        """
        rates, memory = self.beliefs(observations)
        open_rows = np.arange(len(self.grid)) < self._proposable
        open_rows[list(taken)] = False
        open_rows &= ~memory.certainly_too_large
        if not open_rows.any():
            return None
        gains = self._gains(rates, observations) * memory.fits**FIT_POWER
        in_vain = self._in_vain(rates, memory, observations)
        gains[in_vain] = 0.0
        expected_gain = float(np.max(np.where(open_rows, gains, 0.0)))
        contends = open_rows.copy()
        contends[in_vain] = False
        odds = self._odds(rates, memory, observations, contends)
        if float(odds.max()) >= ODDS_TO_SPEAK_OF:
            score = odds / self._seconds**COST_POWER
        elif expected_gain >= ENOUGH_GAIN:
            score = gains / self._seconds**COST_POWER
        else:
            # Nothing is left to gain: what is likely to be good, and to fit.
            score = np.exp(rates.mean - float(rates.mean.max())) * memory.fits**FIT_POWER
        score = score * (1 + 1e-6 * random.random(len(self.grid)))
        row = int(np.argmax(np.where(open_rows, score, -np.inf)))
        return Proposal(
            config=self.grid.configs[row],
            forecast=self.forecast(row, rates, memory),
            expected_gain=expected_gain,
        )

    def _in_vain(self, rates: RatePosterior, memory: MemoryPosterior, observations: Sequence[Observation]) -> list[int]:
        """Rows of ZeRO-3 that nobody needs: a lower stage fits with the same batch, and it cannot win.

        On one GPU it never wins, as there is nothing to partition; on several where the best so far is
        `HOPELESS_STAGE_3` times as fast as it is predicted to be.
        """
        measured = [each.log_rate for each in observations if each.log_rate is not None and each.from_this_study]
        if self._ranks > 1 and not measured:
            return []
        limit = math.inf if self._ranks == 1 else max(measured) - math.log(HOPELESS_STAGE_3)
        return [
            row
            for row, twins in self._twins.items()
            if rates.mean[row] < limit and (memory.fits[twins] > TWIN_FITS).any()
        ]

    def baselines(self, configs: Sequence[TrialConfig], observations: Sequence[Observation]) -> list[TrialConfig]:
        """The baselines in the order to try them: theirs, but those that are unlikely to fit come last.

        Those that certainly don't fit are left out; but a trial has to say so of the last there is.
        """
        _, memory = self.beliefs(observations)
        rows = {config: self.row(config) for config in configs}
        unlikely = {config: row is not None and memory.fits[row] < BASELINE_FITS for config, row in rows.items()}
        vain = {config: row is not None and memory.certainly_too_large[row] for config, row in rows.items()}
        return sorted(
            (config for config in configs if config == configs[-1] or not vain[config]), key=unlikely.__getitem__
        )

    def forecast(self, row: int, rates: RatePosterior, memory: MemoryPosterior) -> Forecast:
        """Forecast for one row."""
        mean, deviation = float(rates.mean[row]), float(rates.deviation[row])
        return Forecast(
            samples_per_second=math.exp(mean),
            samples_per_second_ci95=(math.exp(mean - 1.96 * deviation), math.exp(mean + 1.96 * deviation)),
            peak_memory_bytes=float(memory.mean_bytes[row]),
            peak_memory_deviation_bytes=float(memory.deviation_bytes[row]),
            probability_of_fitting=float(memory.fits[row]),
        )

    def excluded(self, memory: MemoryPosterior, taken: Collection[int]) -> list[Excluded]:
        """Configurations that certainly do not fit: of each combination of the other knobs its smallest micro-batch."""
        too_large = memory.certainly_too_large & (np.arange(len(self.grid)) < self._proposable)
        too_large[list(taken)] = False
        kinds: dict[tuple[float, int], list[int]] = {}
        for row in too_large.nonzero()[0]:
            kinds.setdefault((float(self.grid.stage[row]), int(self.grid.knobs[row])), []).append(int(row))
        found = []
        for rows in kinds.values():
            smallest = min(rows, key=lambda row: (self.grid.log2_micro_batch[row], self.grid.log2_accumulation[row]))
            found.append(
                Excluded(
                    name=self.grid.configs[smallest].name,
                    predicted_peak_memory_bytes=float(memory.mean_bytes[smallest]),
                    configurations=len(rows),
                )
            )
        return found

    def _gains(self, rates: RatePosterior, observations: Sequence[Observation]) -> Floats:
        """Expected improvement of each row over the best so far, in logarithms, averaged over the trusts."""
        measured = [each for each in observations if each.log_rate is not None and each.from_this_study]
        if not measured:
            return np.exp(rates.mean - float(rates.mean.max()))
        best = max(float(each.log_rate or 0.0) for each in measured)
        gains = np.zeros(len(self.grid))
        for weight, mean, deviation in zip(rates.weights, rates.means, rates.deviations, strict=True):
            ahead = (mean - best) / deviation
            density = np.exp(-0.5 * ahead**2) / math.sqrt(2 * math.pi)
            gains += weight * deviation * (ahead * normal_cdf(ahead) + density)
        return gains

    def _odds(
        self,
        rates: RatePosterior,
        memory: MemoryPosterior,
        observations: Sequence[Observation],
        contends: npt.NDArray[np.bool_],
    ) -> Floats:
        """Probability of each row that it is as good as the best there is and the best so far is not; times the
        square of that of fitting, since a trial that runs out of memory leaves one with a result fewer.

        What the formulas are wrong by in speed is mostly the same for all, so that the rows are drawn together. Whether
        one fits is mostly its own: what it loses to fragments (`LOST_SHARE_DEVIATION`).
        """
        odds = np.zeros(len(self.grid))
        timed = [each for each in observations if each.log_rate is not None]
        rows = np.flatnonzero(contends & (memory.fits > UNLIKELY_TO_FIT))
        if not timed or not len(rows):
            return odds
        hopes = rates.mean[rows] + 2 * rates.deviation[rows]
        rows = rows[np.argsort(-hopes, kind="stable")[:CONTENDERS]]
        own = [each for each in timed if each.from_this_study]
        best = [max(own, key=lambda each: each.log_rate or 0.0).row] if own else []
        random = np.random.default_rng(0)  # the same draws each time: what is believed decides, not chance
        drawn = rates.draws(np.append(rows, best).astype(int), DRAWS, random)
        fits = random.random(drawn.shape) < np.append(memory.fits[rows], [1.0] * len(best))
        fastest = np.where(fits, drawn, -np.inf).max(axis=1, keepdims=True)
        is_as_good = fits & (drawn >= fastest - AS_GOOD)
        if best:
            is_as_good &= ~is_as_good[:, -1:]
        odds[rows] = is_as_good[:, : len(rows)].mean(axis=0) * memory.fits[rows] ** (FIT_POWER - 1)
        return odds


def _twins(configs: Sequence[TrialConfig]) -> dict[int, list[int]]:
    """For each row of ZeRO-3 those that differ in a lower stage alone.

    What stage 3 adds to them is work; on several GPUs it gains where they don't fit, on one only there.
    """
    rows = {config: row for row, config in enumerate(configs)}
    twins = {}
    for config, row in rows.items():
        if config.zero_stage == 3:
            lower = (dataclasses.replace(config, zero_stage=stage) for stage in range(3))
            twins[row] = [rows[twin] for twin in lower if twin in rows]
    return twins


def _trial_seconds(log_rate: Floats, configs: Sequence[TrialConfig], ranks: int, plan: StepPlan) -> Floats:
    """Predicted seconds of each configuration's warm trial."""
    samples: npt.NDArray[np.float64] = np.array([config.global_batch_size(ranks) for config in configs], dtype=float)
    step = samples / np.exp(log_rate)
    accumulation = np.array([config.gradient_accumulation_steps for config in configs])
    warmup = np.array([plan.warmup(config.zero_stage, config.compile) for config in configs])
    warmup = warmup * np.minimum(plan.warmup_micro_steps / accumulation, 1.0)
    setup = np.array(
        [SETUP_SECONDS[config.zero_stage] + COMPILATION_SECONDS.get(config.compile, 0.0) for config in configs]
    )
    is_long = step > plan.long_step_seconds
    fewest = np.where(is_long, plan.min_long_steps, plan.min_timed_steps)
    timed = np.clip(plan.timed_seconds / step, fewest, plan.max_timed_steps)
    if plan.short_step_seconds:  # one is mostly enough
        micro_steps = np.maximum(plan.short_step_seconds * accumulation / step, FEWEST_MICRO_STEPS)
        has_parts = is_long & (accumulation >= FEWEST_MICRO_STEPS)
        timed = np.where(has_parts, np.minimum(micro_steps / accumulation, 1.0), timed)
    return np.asarray(setup + (warmup + timed) * step)
