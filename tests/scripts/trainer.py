"""A Trainer script as transformers' examples are: every setting is an option, the DeepSpeed file has "auto" in it."""

from dataclasses import dataclass, field

import datasets
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class DataArguments:
    samples: int = field(default=400)
    block_size: int = field(default=32)


def main():
    arguments, training_args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (arguments.samples, arguments.block_size), generator=generator).tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(model=model, args=training_args, train_dataset=data, eval_dataset=data.select(range(16)))
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)


if __name__ == "__main__":
    main()
