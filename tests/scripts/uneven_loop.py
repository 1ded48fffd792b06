"""A loop of one's own on sentences of many lengths, padded to the longest of a batch."""

import argparse

import deepspeed
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=2)
parser.add_argument("--samples", type=int, default=4000)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--no-mask", action="store_true")
parser.add_argument("--local_rank", type=int, default=-1)
deepspeed.add_config_arguments(parser)


def collate(rows):
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main():
    args = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    data = [torch.full((8 + 5 * index % 40,), index % 64) for index in range(args.samples)]
    engine, *_ = deepspeed.initialize(args, model, model_parameters=model.parameters())
    sampler = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=args.batch_size, sampler=sampler, collate_fn=collate)
    for _ in range(args.epochs):
        for batch in loader:
            mask = None if args.no_mask else batch["attention_mask"]
            loss = engine(batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss
            engine.backward(loss)
            engine.step()


if __name__ == "__main__":
    main()
