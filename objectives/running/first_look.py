"""First look at a dataset, before any rank: in a process of its own, for the tuner imports nothing that reads data."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.running.local_launcher import GuardedGroup
from ds_tune.objectives.workload.data_facts import DataFacts
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

LOOK_MODULE = "ds_tune.objectives.rank.data_look"

QUIET_SECONDS = 5.0
"""After these a person wants to know what is going on: most data is read in two."""

LOG_LINES = 10


def with_first_look(workload: HuggingFaceWorkload, say: Callable[[str], None]) -> HuggingFaceWorkload:
    """The same workload, with what is trained on of its dataset; of synthetic tokens there is nothing to say.

    Args:
        say: told in one line that it takes long.

    Raises:
        UsageError: the dataset cannot be read, or cannot be trained on.
        EnvironmentFault: the process ended without an answer.
    """
    if workload.dataset is None:
        return workload
    group = GuardedGroup()
    process = subprocess.Popen(
        # -P: nothing in the user's folder shadows a package
        [sys.executable, "-P", "-m", LOOK_MODULE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=group.id,
    )  # fmt: skip
    try:
        document = workload.to_json()
        del document["type"]
        try:
            answer, log = process.communicate(json.dumps(document).encode(), timeout=QUIET_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"Reading {workload.dataset}, which takes a while the first time …")
            answer, log = process.communicate()
    finally:
        group.signal_all()
        process.wait()
        group.reap()
    if process.returncode != 0 or not answer:
        tail = "\n".join(log.decode(errors="replace").splitlines()[-LOG_LINES:])
        raise EnvironmentFault(f"`dataset={workload.dataset}` could not be looked at; what was written last:\n{tail}")
    found = json.loads(answer)
    if "refused" in found:
        raise (UsageError if found["usage"] else EnvironmentFault)(found["refused"])
    return dataclasses.replace(workload, data=DataFacts(**found["facts"]))
