"""A variable is set above the imports; the model cannot be made where parameters are partitioned as they are made."""

import os

os.environ["HF_HOME"] = os.path.abspath("hub")

import argparse
import json

import deepspeed
import huggingface_hub.constants
import torch

assert os.environ["HF_HOME"] == huggingface_hub.constants.HF_HOME


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 32)
        self.head = torch.nn.Linear(32, 4)
        self._init_weights()

    def _init_weights(self):
        with torch.no_grad():
            self.embedding.weight[0].zero_()

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))


parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--deepspeed_config")
args = parser.parse_args()
with open(args.deepspeed_config) as file:
    config = json.load(file)
deepspeed.init_distributed()
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config, enabled=config["zero_optimization"]["stage"] == 3):
    model = Model()
engine, *_ = deepspeed.initialize(args, model, model_parameters=model.parameters())
while engine.global_steps < 1000:
    ids = torch.randint(16, (args.batch_size, 8))
    engine.backward(torch.nn.functional.cross_entropy(engine(ids), ids[:, 0] % 4))
    engine.step()
