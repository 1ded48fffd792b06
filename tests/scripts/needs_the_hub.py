"""Loads a model by its name on the hub."""

from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained("someone/some-model")
