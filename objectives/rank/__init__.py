"""A rank process: the only code of ds-tune that imports torch."""
