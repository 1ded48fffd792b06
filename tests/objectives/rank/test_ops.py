"""DeepSpeed's Muon is imported for every engine; only who trains with it needs torch's compiler for that."""

import subprocess
import sys

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
