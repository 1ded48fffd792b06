"""Which trial next, and when to stop: the search, its console and its commands; `tune` runs all of it."""

from ds_tune.tuner.api import tune

__all__ = ["tune"]
