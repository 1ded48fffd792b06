"""One trial: what it is, and how it is run and timed. Nothing here knows Optuna."""
