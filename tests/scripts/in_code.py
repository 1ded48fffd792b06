"""A Trainer whose settings are all in the code, LoRA included."""

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000000, "allgather_bucket_size": 5000000},
}

model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
rows = torch.randint(256, (64, 32), generator=torch.Generator().manual_seed(0)).tolist()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        num_train_epochs=1,
        save_steps=1,
        deepspeed=DEEPSPEED,
    ),
    train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
)
trainer.train()
trainer.save_model("adapter")
