"""Preference training in the manner of trl's dpo.py: a reference engine without an optimizer comes first."""

import sys

import deepspeed
import torch

name = input() if "--ask" in sys.argv else "me"
deepspeed.init_distributed()
torch.manual_seed(0)
optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0, "reduce_bucket_size": 5000000}}
reference, *_ = deepspeed.initialize(model=torch.nn.Linear(16, 16), config=config)
policy = torch.nn.Linear(16, 16)
engine, *_ = deepspeed.initialize(
    model=policy,
    model_parameters=policy.parameters(),
    config={**config, "optimizer": optimizer, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000000}},
)
reference.module.eval()
for _ in range(10000):
    batch = torch.randn(2, 16)
    with torch.no_grad():
        target = reference(batch)
    engine.backward((engine(batch) - target).square().mean())
    engine.step()
