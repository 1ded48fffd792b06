"""Two ranks that are fed micro-batches of known tokens, and print the shares of their steps that they agree on.

python two_ranks.py FOLDER LENGTHS, the last as JSON: for each rank its steps, lists of micro-batches' tokens.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.fed import FedSteps
from ds_tune.objectives.rank.micro_batch import MicroBatch


def tell(rank: int, folder: Path, steps: list[list[int]]) -> list[list[float]]:
    """Shares at a first reading, of all steps, and at a second one, of the first step once more."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    fed = FedSteps(Peers(torch.device("cpu")), samples_per_step=4, tokens_per_sample=3.0, is_packed=False)
    told = []
    for read in (steps, steps[:1]):
        for lengths in read:
            for length in lengths:
                mask = (torch.arange(8) < length).long()[None]
                fed.fed(MicroBatch((), {"input_ids": torch.ones_like(mask), "attention_mask": mask}, ()))
            fed.step_done()
        told.append(fed.shares())
        fed.forget()
    torch.distributed.destroy_process_group()
    return told


def main() -> None:
    folder, lengths = Path(sys.argv[1]), json.loads(sys.argv[2])
    child = os.fork()
    rank = 0 if child else 1
    (folder / f"{rank}.json").write_text(json.dumps(tell(rank, folder, lengths[rank])))
    if child:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
