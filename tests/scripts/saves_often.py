"""A script with all that a trial must not leave behind, or stumble over."""

import atexit
import os
import subprocess
import sys

import deepspeed
import torch

sys.stdin.read()  # nobody types
deepspeed.init_distributed()
torch.manual_seed(0)
model = torch.nn.Linear(16, 16)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=sys.argv[1])
atexit.register(lambda: open("left-by-atexit", "w").close())
child = subprocess.Popen(["sleep", "600"])
try:
    for step in range(1_000_000):
        loss = engine(torch.randn(2, 16)).square().mean()
        engine.backward(loss)
        engine.step()
        if step % 8 == 7:
            engine.save_checkpoint("checkpoints")
finally:
    open(f"left-by-finally-{os.getpid()}", "w").close()
