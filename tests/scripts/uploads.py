"""A Trainer that does all that a trial must not: trackers, and ways of writing to the hub, some before it trains."""

import os

os.environ["HF_ENDPOINT"] = os.environ["THE_HUB"]
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["HF_TOKEN"] = "hf_invented"

import accelerate
import datasets
import torch
from huggingface_hub import HfApi, create_repo, upload_folder
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000000, "allgather_bucket_size": 5000000},
}


class Uploads(TrainerCallback):
    """After each step, as people have it after each epoch."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(os.path.join(os.path.dirname(__file__), "saved"), push_to_hub=True)
        model.push_to_hub("me/model")
        model.config.push_to_hub("me/model")
        commit = api.upload_folder(repo_id=repository, folder_path=os.path.dirname(__file__), commit_message="a step")
        print(
            "commit",
            commit.oid[:4],
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repository, run_as_future=True)
            .result()
            .commit_message,
            flush=True,
        )


api = HfApi()
repository = api.create_repo("me/model", exist_ok=True).repo_id
assert create_repo("data", repo_type="dataset").repo_id.endswith("/data")
upload_folder(repo_id=repository, folder_path=os.path.dirname(os.path.abspath(__file__)))
rows = torch.randint(256, (64, 32), generator=torch.Generator().manual_seed(0)).tolist()
data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
trainer = Trainer(
    model=GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2)),
    args=TrainingArguments(
        output_dir="out", per_device_train_batch_size=2, push_to_hub=True, hub_model_id="me/model", save_steps=1,
        report_to=["tensorboard", "wandb"], hub_strategy="every_save", deepspeed=DEEPSPEED,
    ),
    train_dataset=data,
    callbacks=[Uploads()],
)  # fmt: skip
trainer.accelerator.init_trackers("run")
trainer.accelerator.log({"loss": 0.0})
accelerate.Accelerator(log_with="tensorboard", project_dir="logs").init_trackers("run")
trainer.push_to_hub()
trainer.train()
