"""What every test relies on: DeepSpeed on the CPU, no hub, caches that vanish, no GPU tests where there is no GPU.

And signals that are heeded: under `nohup` or in the background of a script, whatever a test starts would ignore some.
"""

import os
import shutil
import signal
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports DeepSpeed, transformers or datasets, here or in a rank that a test starts.
    if shutil.which("nvidia-smi") is None:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ds-tune-tests-hf-")
    heeded = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in heeded.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
