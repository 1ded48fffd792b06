"""What one trial is, and how it is run and timed. Nothing here knows Optuna."""
