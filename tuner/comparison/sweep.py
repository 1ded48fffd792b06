"""Tuning by hand, as the comparison published for DeepSpeed's autotuner has it: mbs 1, doubled until memory is out."""

import dataclasses
from collections.abc import Mapping, Sequence

from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.tuner.limits import Limits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Configurations that a person tries, stage by stage."""

    stages: Sequence[int]
    limits: Limits
    """Bounds of the batch sizes. With a global batch, gas follows from mbs; gas is 1 otherwise."""

    def path(self, known: Mapping[str, Outcome]) -> list[TrialConfig]:
        """The configurations in their order, up to the first one that has not run.

        Args:
            known: outcomes by the configuration's name, those of other sweeps among them.
        """
        found = []
        for stage in self.stages:
            for config in self._doubled(stage):
                if config.name not in known and self._is_too_large(config, known):
                    break
                found.append(config)
                if config.name not in known:
                    return found
                if isinstance(known[config.name], Failure):
                    break
        return found

    def next(self, known: Mapping[str, Outcome]) -> TrialConfig | None:
        """The configuration to run next; None when there is none left."""
        path = self.path(known)
        return path[-1] if path and path[-1].name not in known else None

    def _doubled(self, stage: int) -> list[TrialConfig]:
        """Configurations of a stage within the limits, mbs ascending."""
        limits, configs = self.limits, []
        size = 1
        while size <= limits.max_micro_batch:
            samples = size if limits.global_batch is None else limits.global_batch // limits.ranks
            if samples % size == 0:
                config = TrialConfig(
                    zero_stage=stage, micro_batch_size=size, gradient_accumulation_steps=samples // size
                )
                if limits.allow(config):
                    configs.append(config)
            size *= 2
        return configs

    def _is_too_large(self, config: TrialConfig, known: Mapping[str, Outcome]) -> bool:
        """Whether its micro-batch ran out of memory with another gas, on which memory hardly depends."""
        alone = dataclasses.replace(config, gradient_accumulation_steps=1)
        outcome = known.get(alone.name)
        return isinstance(outcome, Failure) and outcome.kind is FailureKind.OUT_OF_MEMORY


def fastest_first(
    configs: Sequence[TrialConfig], known: Mapping[str, Outcome]
) -> list[tuple[TrialConfig, Measurement]]:
    """Those of the configurations that were measured, the fastest first."""
    measured = [(config, outcome) for config in configs if isinstance(outcome := known.get(config.name), Measurement)]
    return sorted(measured, key=lambda pair: -pair[1].samples_per_second)


def failure_words(outcome: Failure) -> str:
    """Why a configuration did not run, in a short sentence without a full stop."""
    if outcome.kind is FailureKind.OUT_OF_MEMORY:
        return "out of memory"
    return f"{outcome.kind.value.replace('_', ' ')}: {outcome.message}"
