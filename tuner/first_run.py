"""First run of a person's script: as it stands, for a few steps, to learn what it trains; remembered for a resume."""

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launcher import Launcher
from ds_tune.objectives.trial import Failure, FailureKind
from ds_tune.objectives.workload.script import ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts
from ds_tune.storage.layout import ResultsFolder

FIRST_RUN_SECONDS = 1800.0
"""A script that has not taken its first steps by then hangs: it may download, tokenize and load before."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FirstRun:
    """What a script trains, and how long it took to show it."""

    facts: ScriptFacts
    seconds: float
    """Seconds from the start of its processes to the end of its second optimizer step."""
    key: str
    """Digest of all that decided it: the script and its DeepSpeed file, how it is started, and the machine."""

    @classmethod
    def remembered(cls, results: ResultsFolder, key: str) -> Self | None:
        """The one that a results folder holds, if it is of the same script, unchanged."""
        try:
            document = json.loads(results.first_run.read_text())
            run = cls(facts=ScriptFacts.from_json(document["facts"]), seconds=document["seconds"], key=document["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return run if run.key == key else None

    def remember(self, results: ResultsFolder) -> None:
        """Keeps it in a results folder."""
        document = {"key": self.key, "seconds": self.seconds, "facts": self.facts.to_json()}
        write_atomically(results.first_run, json.dumps(document))


def first_run(
    workload: ScriptWorkload,
    machine: Machine,
    launcher_of: Callable[[Machine], Launcher],
    results: ResultsFolder,
    say: Callable[[str], None],
) -> FirstRun:
    """Runs a script as it stands, unless the results folder knows what that shows.

    Raises:
        UsageError: it does not train under DeepSpeed.
    """
    key = _key(workload, machine)
    if (known := FirstRun.remembered(results, key)) is not None:
        return known
    say(f"Running {workload.title} as it stands for two optimizer steps, to learn what it trains …")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ds-tune-first-run-") as folder, launcher_of(machine) as launcher:
        objective = DeepSpeedObjective(
            workload, machine, launcher=launcher, log_folder=Path(folder), trial_seconds=FIRST_RUN_SECONDS,
            fresh_ranks=True,
        )  # fmt: skip
        try:
            learned = objective.learn(Path(folder))
        finally:
            objective.close()
    if isinstance(learned, Failure):
        said = learned.message.partition(": ")[2] or learned.message
        if learned.kind is FailureKind.TIMEOUT:
            said = f"it had not taken its first two optimizer steps after {time.monotonic() - began:.0f} s"
        tail = f"\nwhat it wrote last:\n{learned.log_tail}" if learned.log_tail else ""
        raise UsageError(f"{workload.title} does not train as it stands ({learned.phase}): {said}{tail}")
    if learned.samples_per_micro_batch != learned.micro_batch_size:
        raise UsageError(
            f"{workload.title} feeds {learned.samples_per_micro_batch} samples a micro-step where its DeepSpeed "
            f"configuration says {learned.micro_batch_size}; make the two agree, for what it trains is not known"
        )
    return FirstRun(facts=learned, seconds=time.monotonic() - began, key=key)


def _key(workload: ScriptWorkload, machine: Machine) -> str:
    start = workload.start
    files = [] if start.is_module else [Path(start.program)]
    if (index := start.ds_config_argument()) is not None:
        files.append(Path(start.folder, start.arguments[index].rpartition("=")[2]))
    said: list[Any] = [workload.to_json(), machine.to_json()]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
