"""Ranks of a tuner that itself runs inside a job of MPI, Slurm or torchrun."""

from collections.abc import Callable

import pytest

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.job_environment import without_job
from ds_tune.objectives.running.local_launcher import group_environment
from ds_tune.objectives.trial import Measurement, Outcome

JOB = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "PMI_RANK": "3", "PMIX_RANK": "3",
    "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "MV2_COMM_WORLD_RANK": "3", "RANK": "3",
    "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1", "GROUP_RANK": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "JSM_NAMESPACE_RANK": "3", "FLUX_TASK_RANK": "3", "PALS_RANKID": "3",
}  # fmt: skip


def test_what_makes_a_process_a_rank_of_a_job_is_left_out_and_the_rest_stays() -> None:
    kept = {
        "HOME": "/home/me",
        "NCCL_DEBUG": "INFO",
        "SLURM_TMPDIR": "/scratch",
        "OMP_NUM_THREADS": "2",
        "RANKING": "1",
    }
    assert without_job({**JOB, **kept}) == kept


def test_ranks_have_a_world_of_their_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    environment = group_environment(machine)
    assert {name: environment[name] for name in JOB if name in environment} == {"WORLD_SIZE": "2"}


@pytest.mark.slow
def test_a_trial_runs_inside_a_job_of_mpi(train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    outcome = train()
    assert isinstance(outcome, Measurement), outcome
