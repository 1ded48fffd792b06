"""Every file name that a study owns, in its results folder."""

import dataclasses
from pathlib import Path

from ds_tune.objectives.trial import TrialConfig

DEFAULT_RESULTS = "autotuning_results"
"""Name of the results folder, the one that DeepSpeed's own autotuner uses."""

TRIAL_FOLDERS = "z[0-3]_*gas*_tmbspg*"
"""Glob pattern that matches the names of all trials' folders."""


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
    def first_run(self) -> Path:
        """What a person's script showed when it ran as it stands."""
        return self.root / "script.json"

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

    def in_the_way(self) -> Path | None:
        """A folder where a file is to be written, or a file where a folder is; None if all is well."""
        files = [
            self.database, self.owner, self.summary_text, self.summary_markdown, self.trials_csv, self.study_json,
            self.optimal_config, self.optimal_command, self.first_run,
        ]  # fmt: skip
        folders = [self.process_logs, *self.root.glob(TRIAL_FOLDERS)]
        wrong = [path for path in files if path.is_dir()]
        wrong += [path for path in folders if path.exists() and not path.is_dir()]
        return min(wrong, default=None)
