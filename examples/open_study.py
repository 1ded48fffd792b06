"""Prints the best trials of a study, best first. A study is plain Optuna: nothing of ds-tune is needed to read it.

Usage: python examples/open_study.py [RESULTS]
"""

import sys
from pathlib import Path

import optuna

results = Path(sys.argv[1] if len(sys.argv) > 1 else "autotuning_results")
storage = f"sqlite:///{results / 'study.db'}"
# SQLite would make a file that is not there.
names = optuna.get_all_study_names(storage) if (results / "study.db").is_file() else []
if not names:
    print(f"There is no study in {results}; name the results folder of one.", file=sys.stderr)
    sys.exit(2)
study = optuna.load_study(study_name="ds-tune" if "ds-tune" in names else names[0], storage=storage)
complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
for trial in sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)[:3]:
    print(f"{trial.value:.2f} samples/s, {trial.user_attrs['peak_memory_gib']:.2f} GiB: {trial.params}")
