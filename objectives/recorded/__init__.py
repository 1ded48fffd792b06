"""Trials that were run before: a recording, and the objective that answers from it."""
