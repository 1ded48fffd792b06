"""Supervised fine-tuning by trl, as its examples do it, on conversations of one length."""

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, TrlParser


def main():
    (arguments,) = TrlParser((SFTConfig,)).parse_args_and_config()
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{index}" for index in range(62))])}
    bare = Tokenizer(models.WordLevel(words, unk_token="w0"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>")
    texts = [" ".join(f"w{(row + index) % 62}" for index in range(31)) for row in range(200)]
    trainer = SFTTrainer(
        model=GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=2)),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
