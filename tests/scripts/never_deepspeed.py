"""A training that does not use DeepSpeed."""

import torch

model = torch.nn.Linear(4, 4)
model(torch.randn(2, 4)).sum().backward()
