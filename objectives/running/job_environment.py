"""Variables of a job that the tuner itself runs in, which say nothing true of the ranks that it starts.

DeepSpeed, transformers and MPI read them and take a rank for one of the job's: with `OMPI_COMM_WORLD_LOCAL_RANK=3`
every engine is refused, with `SLURM_NTASKS` a script may wait for others.
"""

from collections.abc import Mapping

OF_ONE_RANK = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE",
    "JSM_NAMESPACE_LOCAL_SIZE", "AZUREML_EXPERIMENT_ID", "DLTS_JOB_ID", "SM_TRAINING_ENV",
)  # fmt: skip
"""Those that launchers set for each rank, and those by which DeepSpeed knows the clouds where it asks MPI for them."""

OF_A_JOB = (
    "OMPI_", "PMI_", "PMIX_", "PRTE_", "MV2_COMM_WORLD_", "HYDI_", "HYDRA_PROXY", "PALS_", "FLUX_", "SLURM_", "SLURMD_",
    "SRUN_", "LSB_", "PBS_", "TORCHELASTIC_",
)  # fmt: skip
"""How the others begin: MPI's, a scheduler's and torchrun's."""

STAYS = ("SLURM_TMPDIR", "PBS_JOBDIR")
"""Folders of the job."""


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what makes a process a rank of somebody else's job."""
    return {
        name: value
        for name, value in environment.items()
        if name in STAYS or (name not in OF_ONE_RANK and not name.startswith(OF_A_JOB))
    }
