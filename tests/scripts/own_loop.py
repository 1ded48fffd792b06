"""A loop of one's own around deepspeed.initialize, with a DeepSpeed file, as many people have it."""

import argparse

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--samples", type=int, default=4000)
parser.add_argument("--out", default="checkpoint.pt")
parser = deepspeed.add_config_arguments(parser)
parser.add_argument("--local_rank", type=int, default=-1)


def main():
    args = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)
    )
    data = TensorDataset(torch.randn(args.samples, 64), torch.randint(8, (args.samples,)))
    engine, *_ = deepspeed.initialize(args, model, model_parameters=model.parameters())
    loader = DataLoader(data, batch_size=args.batch_size, sampler=DistributedSampler(data))
    try:
        for epoch in range(args.epochs):
            for inputs, labels in loader:
                loss = torch.nn.functional.cross_entropy(engine(inputs), labels)
                engine.backward(loss)
                engine.step()
            print(f"epoch {epoch}: loss {loss.item():.4f}")
            engine.save_checkpoint("checkpoints")
    finally:
        torch.save(engine.module.state_dict(), args.out)


if __name__ == "__main__":
    main()
