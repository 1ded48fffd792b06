"""An Accelerate loop whose DeepSpeed settings come from a plugin in the code."""

import argparse

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    plugin = DeepSpeedPlugin(zero_stage=1, gradient_accumulation_steps=args.gradient_accumulation_steps)
    accelerator = Accelerator(deepspeed_plugin=plugin, log_with="tensorboard", project_dir="logs")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randint(256, (args.samples, 32), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        [{"input_ids": row, "labels": row} for row in rows], batch_size=args.per_device_train_batch_size, shuffle=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.init_trackers("run")
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.log({"loss": loss.item()})
        accelerator.save_state("state")
    accelerator.end_training()


if __name__ == "__main__":
    main()
