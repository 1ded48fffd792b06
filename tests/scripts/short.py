"""Ends after three optimizer steps."""

import deepspeed
import torch

deepspeed.init_distributed()
model = torch.nn.Linear(4, 4)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000000, "allgather_bucket_size": 5000000},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for _ in range(3):
    engine.backward(engine(torch.randn(2, 4)).sum())
    engine.step()
