"""A loop over an endless-looking stream that is short, with workers; it evaluates before it trains and in between."""

import argparse

import deepspeed
import torch
from torch.utils.data import DataLoader, IterableDataset

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--samples", type=int, default=21)
parser.add_argument("--max-steps", type=int, default=1_000_000)
parser.add_argument("--deepspeed_config")
args = parser.parse_args()


class Stream(IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, args.samples, every):
            yield torch.full((16,), float(index)), torch.tensor(index % 4)


def evaluate():
    engine.eval()
    with torch.no_grad():
        total = sum(engine(inputs).sum().item() for inputs, _ in held_out)
    engine.train()
    return total


deepspeed.init_distributed()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
engine, *_ = deepspeed.initialize(args, model, model_parameters=model.parameters())
train = DataLoader(Stream(), batch_size=args.batch_size, num_workers=2, persistent_workers=True)
held_out = DataLoader([(torch.ones(16), 0)] * 3, batch_size=3)
print("before", evaluate())
for inputs, labels in train:
    engine.backward(torch.nn.functional.cross_entropy(engine(inputs), labels))
    engine.step()
    print("step", engine.global_steps, len(inputs), flush=True)
    if engine.is_gradient_accumulation_boundary() and engine.global_steps % 2 == 0:
        print("between", evaluate())
    if engine.global_steps == args.max_steps:
        break
print("trained")
