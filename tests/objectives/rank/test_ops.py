"""What DeepSpeed compiles, and imports for every engine though only few train with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from objectives.rank.ops import import_muon
os.environ["TORCHDYNAMO_DISABLE"] = "0"
import_muon({{"optimizer": {{"type": {optimizer!r}}}}})
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print(os.environ["TORCHDYNAMO_DISABLE"], "functorch.compile" in sys.modules)
"""


@pytest.mark.parametrize(("optimizer", "loads_the_compiler"), [("AdamW", False), ("Muon", True)])
def test_it_loads_the_compiler_where_it_trains(optimizer: str, loads_the_compiler: bool) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(optimizer=optimizer)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-2:] == ["0", str(loads_the_compiler)]


DEEPCOMPILE = """
import sys
import torch
torch.distributed.init_process_group("gloo", init_method="file://{folder}/store", rank=0, world_size=1)
from objectives.errors import EnvironmentFault
from objectives.rank.ops import prepare_deepcompile
try:
    prepare_deepcompile(lambda text, seconds: None)
except EnvironmentFault as fault:
    print(sys.getrecursionlimit())
    print(fault)
"""


def test_where_deepcompiles_op_cannot_be_compiled_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "false", "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", DEEPCOMPILE.format(folder=tmp_path)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    *_, recursion_limit, said = ran.stdout.splitlines()
    assert int(recursion_limit) > 10_000, "its passes recurse once a node of the graph"
    assert said.startswith("DeepSpeed's dc cannot be compiled (")
    assert said.endswith("or leave compile=deepcompile out")
    assert len(said) < 450
