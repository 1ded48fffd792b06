"""What DeepSpeed compiles, and imports for every engine though only few train with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from ds_tune.objectives.rank.ops import import_muon
os.environ["TORCHDYNAMO_DISABLE"] = "0"
import_muon({{"optimizer": {{"type": {optimizer!r}}}}})
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print(os.environ["TORCHDYNAMO_DISABLE"], "functorch.compile" in sys.modules)
"""


@pytest.mark.parametrize(("optimizer", "loads_the_compiler"), [("AdamW", False), ("Muon", True)])
def test_torch_compiler_is_imported_with_muon_and_not_with_adamw(optimizer: str, loads_the_compiler: bool) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(optimizer=optimizer)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-2:] == ["0", str(loads_the_compiler)]


KNOB_OP = """
import sys
import torch
torch.distributed.init_process_group("gloo", init_method="file://{folder}/store", rank=0, world_size=1)
from ds_tune.objectives.errors import EnvironmentFault
from ds_tune.objectives.rank.ops import load_knob_op
try:
    load_knob_op({field!r}, {value!r}, lambda text, seconds: None)
except EnvironmentFault as fault:
    print(sys.getrecursionlimit())
    print(fault)
"""


@pytest.mark.parametrize(
    ("field", "value", "device", "name", "recurses"),
    [("compile", "deepcompile", "cpu", "dc", True), ("quantized_weights", "on", "cuda", "quantizer", False)],
)
def test_knob_op_that_cannot_be_compiled_is_an_environment_fault_with_a_remedy(
    field: str, value: str, device: str, name: str, recurses: bool, tmp_path: Path
) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "false", "DS_ACCELERATOR": device}
    ran = subprocess.run(
        [sys.executable, "-c", KNOB_OP.format(folder=tmp_path, field=field, value=value)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    *_, recursion_limit, said = ran.stdout.splitlines()
    assert (int(recursion_limit) > 10_000) is recurses, "DeepCompile's passes recurse once a node of the graph"
    assert said.startswith(f"DeepSpeed's {name} cannot be compiled (")
    assert said.endswith(f"or leave {field}={value} out")
    assert len(said) < 450
