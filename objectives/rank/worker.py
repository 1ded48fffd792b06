"""What a rank process does: get ready once, then run the trials that arrive on its standard input.

Started by `objectives.running.launcher`; the protocol is described in `objectives.running.rank_group`.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.errors import DsTuneError, UsageError
from ds_tune.objectives.files import result_file, write_atomically
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank import zero3_release
from ds_tune.objectives.rank.cleanup import collectives_issued, release_trial
from ds_tune.objectives.rank.data import load_blocks
from ds_tune.objectives.rank.device import cap_memory, claim_device, lift_cap, local_rank, meter_for, resident_bytes
from ds_tune.objectives.rank.distributed import connect_ranks
from ds_tune.objectives.rank.loss_curve import run_losses
from ds_tune.objectives.rank.model import load_config
from ds_tune.objectives.rank.ops import import_muon, load_optimizer_op, optimizer_op
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.rank.training import run_trial
from ds_tune.objectives.running.failures import first_sentence, kind_of_exception
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Failure, TrialConfig
from ds_tune.objectives.workload.huggingface import Workload

ANY_CONFIG = TrialConfig(zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1)


class Worker:
    """One rank, ready to run trials."""

    def __init__(self, setup: dict[str, Any], progress: Progress) -> None:
        """
        Raises:
            UsageError, EnvironmentFault: no trial could run; the text is for the user.
        """
        self._progress = progress
        self._workload = Workload.from_json(setup["workload"])
        self._machine = Machine.from_json(setup["machine"])
        self._device = claim_device(self._machine, local_rank())
        self._meter = meter_for(self._device)
        self._model_config = load_config(self._workload)
        self._blocks = load_blocks(self._workload, self._model_config.get_text_config().vocab_size)
        connect_ranks(self._device)
        self._rank = torch.distributed.get_rank()
        configs = [TrialConfig.from_json(each) for each in setup["optimizers"]] or [ANY_CONFIG]
        of_each_op = {optimizer_op(ds_config): ds_config for ds_config in map(self._ds_config, configs)}
        for number, ds_config in enumerate(of_each_op.values()):
            load_optimizer_op(ds_config, progress.notice, is_required=number == 0)
        import_muon(self._ds_config(ANY_CONFIG))
        zero3_release.install()
        # What the imports made stays: a trial's collection of garbage need not walk half a million objects each time.
        gc.collect()
        gc.freeze()
        cap_memory(self._machine)
        self._held_after_first: dict[str, int] | None = None

    def _ds_config(self, config: TrialConfig) -> dict[str, Any]:
        return deepspeed_config(config, self._workload, ranks=self._machine.ranks, device=self._machine.device)

    def run(
        self,
        config: TrialConfig,
        folder: Path,
        *,
        seconds_per_sample: float | None,
        best_samples_per_second: float | None,
        plan: Mapping[str, Any],
        losses: int,
    ) -> None:
        """Runs one trial and leaves its result, or why there is none, in this rank's result file.

        Args:
            plan: the fields of a `StepPlan`.
            losses: above zero, not the time of steps is wanted but the loss of so many.
        """
        _log_to(folder)
        self._meter.reset_peaks()
        self._progress.phase = "start"
        engines: list[deepspeed.DeepSpeedEngine] = []
        shared: dict[str, Any] = {
            "seconds_per_sample": seconds_per_sample,
            "workload": self._workload,
            "machine": self._machine,
            "model_config": self._model_config,
            "blocks": self._blocks,
            "device": self._device,
            "progress": self._progress,
            "engines": engines,
        }
        try:
            if losses:
                document = run_losses(config, losses, **shared)
            else:
                document = run_trial(
                    config,
                    best_samples_per_second=best_samples_per_second,
                    plan=StepPlan(**plan),
                    meter=self._meter,
                    **shared,
                )
        except Exception as error:
            lift_cap(self._machine)
            traceback.print_exc()
            self._report(folder, self._failure(error).to_json(), event="failed")
        else:
            self._report(folder, document, event="finished")
        # Only here is the exception gone, and with it what its frames held of the model.
        issued = collectives_issued()
        release_trial(engines.pop() if engines else None)
        cap_memory(self._machine)
        held = {"device": self._meter.held_bytes(), "host": resident_bytes()}
        if self._held_after_first is None:
            self._held_after_first = held
        left = {kind: held[kind] - self._held_after_first[kind] for kind in held}
        self._progress.send("released", left_bytes=left, collectives=issued)

    def _failure(self, error: Exception) -> Failure:
        phase = self._progress.phase
        peak_bytes = self._meter.peak_memory_bytes()
        return Failure(
            kind=kind_of_exception(error, phase),
            message=f"rank {self._rank} in {phase}: {first_sentence(error)}",
            phase=phase,
            rank=self._rank,
            peak_memory_bytes=peak_bytes,
        )

    def _report(self, folder: Path, document: dict[str, Any], *, event: str) -> None:
        write_atomically(result_file(folder, self._rank), json.dumps(document))
        self._progress.send(event)


def _log_to(folder: Path) -> None:
    """Sends everything that is printed from here on, by C++ libraries too, to the trial's log files."""
    for name, stream in (("stdout.log", sys.stdout), ("stderr.log", sys.stderr)):
        stream.flush()
        target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, stream.fileno())
        os.close(target)


def main() -> None:
    progress = Progress(int(os.environ.pop("DS_TUNE_EVENT_FD")))
    commands = sys.stdin
    setup = json.loads(commands.readline())
    try:
        worker = Worker(setup, progress)
    except DsTuneError as error:
        progress.send("refused", usage=isinstance(error, UsageError), message=str(error))
        return
    progress.send("ready")
    for line in commands:
        command = json.loads(line)
        worker.run(
            TrialConfig.from_json(command["config"]),
            Path(command["folder"]),
            seconds_per_sample=command["seconds_per_sample"],
            best_samples_per_second=command["best_samples_per_second"],
            plan=command["plan"],
            losses=command["losses"],
        )


if __name__ == "__main__":
    main()
