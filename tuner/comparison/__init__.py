"""Comparison of the ways to train a model: without DeepSpeed, with DeepSpeed tuned by hand, and tuned by ds-tune."""
