"""What a rank process does: the only code of ds-tune, besides `objectives.train`, that imports torch."""
