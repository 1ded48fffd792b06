"""What a rank process does: the only code of ds-tune, besides `objectives.rank.train`, that imports torch."""
