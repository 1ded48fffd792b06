"""Starts its own ranks."""

import sys

import torch.multiprocessing as mp
from accelerate import notebook_launcher


def train(rank):
    raise AssertionError


if __name__ == "__main__":
    if "--notebook" in sys.argv:
        notebook_launcher(train, num_processes=2)
    mp.spawn(train, nprocs=2)
