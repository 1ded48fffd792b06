"""Says what its model is like when it trains."""

import argparse

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
parser.add_argument("--local_rank", type=int)
steps = parser.parse_args().steps
deepspeed.init_distributed("gloo")
model = GPT2LMHeadModel(GPT2Config(vocab_size=250, n_positions=64, n_embd=64, n_layer=2, n_head=2))
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"torch_adam": True}}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for _ in range(steps):
    ids = torch.randint(250, (1, 32))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
head, blocks = model.lm_head, model.transformer.h
checkpointed = [block.gradient_checkpointing for block in blocks]
print(f"{type(head).__name__} {head.multiple}, blocks checkpointed: {checkpointed}, {engine.global_steps} steps")
