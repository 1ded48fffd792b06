"""What every test relies on: DeepSpeed on the CPU, no hub, caches that vanish, no GPU tests where there is no GPU."""

import os
import shutil
import signal
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports DeepSpeed, transformers or datasets, here or in a rank that a test starts.
    if shutil.which("nvidia-smi") is None:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # A shell has what it starts with `&` ignore these, and the programs that the tests interrupt would inherit it.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ds-tune-tests-hf-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
