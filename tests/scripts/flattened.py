"""A loop of one's own that puts the samples of a micro-batch into one row, without padding."""

import argparse

import deepspeed
from torch.utils.data import DataLoader, DistributedSampler
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel

parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=2)
parser.add_argument("--samples_at_once", type=int, default=None)
parser.add_argument("--local_rank", type=int, default=-1)
deepspeed.add_config_arguments(parser)


def main():
    args = parser.parse_args()
    deepspeed.init_distributed()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    data = [{"input_ids": [index % 64] * (8 + 5 * index % 40)} for index in range(4000)]
    engine, *_ = deepspeed.initialize(args, model, model_parameters=model.parameters())
    loader = DataLoader(
        data,
        batch_size=args.samples_at_once or args.batch_size,
        sampler=DistributedSampler(data, shuffle=False),
        collate_fn=DataCollatorWithFlattening(),
    )
    for batch in loader:
        engine.backward(engine(**batch).loss)
        engine.step()


if __name__ == "__main__":
    main()
