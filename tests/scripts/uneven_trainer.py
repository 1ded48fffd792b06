"""A Trainer on samples of many lengths, padded to the longest of a batch, or streamed."""

from dataclasses import dataclass, field

import datasets
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)


@dataclass
class DataArguments:
    streaming: bool = field(default=False)


def main():
    data_args, training_args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    bare = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{index}": index for index in range(1, 64)}}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>")
    rows = [{"input_ids": [1 + index % 63] * (8 + 7 * index % 40)} for index in range(400)]
    data = datasets.Dataset.from_list(rows)
    trainer = Trainer(
        model=GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)),
        args=training_args,
        train_dataset=data.to_iterable_dataset() if data_args.streaming else data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()


if __name__ == "__main__":
    main()
