"""Every file name that a study owns, in its results folder."""

import dataclasses
from pathlib import Path

from objectives.trial import TrialConfig

DEFAULT_RESULTS = "autotuning_results"
"""As DeepSpeed's own autotuner names it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ResultsFolder:
    """The paths inside one results folder; the names are DeepSpeed's where it has one."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "study.db"

    @property
    def storage_url(self) -> str:
        return f"sqlite:///{self.database.resolve()}"

    @property
    def owner(self) -> Path:
        """Names the study whose results are here, so that no other study's are mixed in."""
        return self.root / "study.json"

    @property
    def process_logs(self) -> Path:
        """Where ranks write before they have a trial."""
        return self.root / "processes"

    def trial(self, config: TrialConfig) -> Path:
        return self.root / config.name

    def verification(self, config: TrialConfig) -> Path:
        """For the last of a finalist's runs in fresh processes."""
        return self.trial(config) / "verification"

    def numerics(self, config: TrialConfig, compared: TrialConfig) -> Path:
        """Where one of the two runs that compare a configuration's losses has its logs."""
        return self.trial(config) / "numerics" / compared.name

    def ablation(self, winner: TrialConfig, config: TrialConfig) -> Path:
        """For a run of the winner without one of its settings."""
        return self.trial(winner) / "ablations" / config.name

    @property
    def summary_text(self) -> Path:
        return self.root / "summary.txt"

    @property
    def summary_markdown(self) -> Path:
        return self.root / "summary.md"

    @property
    def trials_csv(self) -> Path:
        return self.root / "trials.csv"

    @property
    def study_json(self) -> Path:
        return self.root / "summary.json"

    @property
    def optimal_config(self) -> Path:
        return self.root / "ds_config_optimal.json"

    @property
    def optimal_command(self) -> Path:
        return self.root / "cmd_optimal.txt"
