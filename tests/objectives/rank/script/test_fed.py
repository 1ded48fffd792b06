"""What optimizer steps were fed, agreed on by two real ranks."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.script.fed import FedSteps, left_out
from ds_tune.objectives.rank.script.micro_batch import MicroBatch

LENGTHS = [[[5, 3], [2]], [[4, 4], [6]]]
"""Tokens of the micro-batches of each step, by rank."""


def tell(rank: int, rendezvous: Path, answer: Connection) -> None:
    """Steps as a rank sees them: shares of a mean step and what is left out, before and after the first reading."""
    store = torch.distributed.FileStore(str(rendezvous), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    fed = FedSteps(Peers(torch.device("cpu")), samples_per_step=4, tokens_per_sample=3.0, is_packed=False)
    told = []
    for renewed in ([False, rank == 1], [True, True], [True, True]):
        for lengths, is_renewed in zip(LENGTHS[rank], renewed, strict=True):
            for length in lengths:
                mask = (torch.arange(8) < length).long()[None]
                fed.fed(MicroBatch((), {"input_ids": torch.ones_like(mask), "attention_mask": mask}, ()))
            fed.step_done(renewed=is_renewed)
        told.append((fed.left_out(), fed.shares()))
        fed.forget()
    answer.send(told)
    torch.distributed.destroy_process_group()


def test_ranks_add_up_their_tokens_and_leave_out_the_same_steps(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [fork.Process(target=tell, args=(rank, tmp_path / "store", sends)) for rank, (_, sends) in enumerate(ends)]
    for rank in ranks:
        rank.start()
    first, second = (receives.recv() if receives.poll(60) else None for receives, _ in ends)
    for rank in ranks:
        rank.join(10)
    assert first == second
    shares = [16 / 12, 8 / 12]
    assert first == [([False, True], shares), ([True, True], shares), ([False, False], shares)]


def test_steps_in_which_data_is_begun_anew_are_left_out_but_not_for_ever() -> None:
    assert left_out([False, True, False, True]) == [False, True, False, True]
    assert left_out([True] * 6) == [True, True, True, False, False, False]
    assert left_out([True, True, False, True], before=2) == [True, False, False, True]
