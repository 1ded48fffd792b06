"""A rank process: it gets ready once, then carries out the commands that arrive on its standard input.

Started by `objectives.running.launcher`; `objectives.running.protocol` has the messages.
"""

import gc
import os
import sys
import traceback
from typing import Any

import torch

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.errors import DsTuneError, EnvironmentFault, UsageError
from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.rank import zero3_release
from ds_tune.objectives.rank.cleanup import collectives_issued, release_trial
from ds_tune.objectives.rank.data import load_blocks
from ds_tune.objectives.rank.device import cap_memory, claim_device, lift_cap, local_rank, meter_for, resident_bytes
from ds_tune.objectives.rank.distributed import Peers, connect_ranks
from ds_tune.objectives.rank.engine import EngineSlot
from ds_tune.objectives.rank.logs import log_to
from ds_tune.objectives.rank.loss_curve import run_losses
from ds_tune.objectives.rank.model_config import load_config
from ds_tune.objectives.rank.ops import import_muon, load_optimizer_op, optimizer_op
from ds_tune.objectives.rank.padded import load_samples
from ds_tune.objectives.rank.process_wide import ProcessWide
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.rank.resources import RankResources
from ds_tune.objectives.rank.training import run_trial
from ds_tune.objectives.running.failures import first_sentence, kind_of_exception
from ds_tune.objectives.running.protocol import (
    DEEPSPEED,
    Failed,
    Finished,
    Losses,
    RankContext,
    RankResult,
    Ready,
    Refused,
    Released,
    Setup,
    Time,
    decode_command,
)
from ds_tune.objectives.trial import Failure, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

ANY_CONFIG = TrialConfig(zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1)


class Worker:
    """One rank, ready to run trials."""

    def __init__(self, context: RankContext, progress: Progress) -> None:
        """
        Raises:
            UsageError, EnvironmentFault: no trial could run; the text is for the user.
        """
        workload, self._machine = context.workload, context.machine
        if not isinstance(workload, HuggingFaceWorkload):
            raise EnvironmentFault(f"no rank trains {workload.title} yet")
        device = claim_device(self._machine, local_rank())
        model_config = load_config(workload)
        self._resources = RankResources(
            workload=workload,
            machine=self._machine,
            model_config=model_config,
            blocks=load_blocks(workload, model_config.get_text_config().vocab_size),
            samples=None if workload.packing else load_samples(workload, model_config.get_text_config().vocab_size),
            device=device,
            meter=meter_for(device),
            peers=Peers(device),
            progress=progress,
            trainer=context.trainer,
        )
        connect_ranks(device)
        if context.trainer == DEEPSPEED:
            self._prepare_deepspeed(context)
        self._process_wide = ProcessWide()
        # What the imports made stays: a trial's collection of garbage need not walk half a million objects each time.
        gc.collect()
        gc.freeze()
        cap_memory(self._machine)
        self._held_after_first: dict[str, int] | None = None

    def _prepare_deepspeed(self, context: RankContext) -> None:
        progress = self._resources.progress
        configs = context.optimizers or (ANY_CONFIG,)
        of_each_op = {optimizer_op(ds_config): ds_config for ds_config in map(self._ds_config, configs)}
        for number, ds_config in enumerate(of_each_op.values()):
            load_optimizer_op(ds_config, progress.notice, is_required=number == 0)
        import_muon(self._ds_config(ANY_CONFIG))
        zero3_release.install()

    def _ds_config(self, config: TrialConfig) -> dict[str, Any]:
        machine = self._machine
        return deepspeed_config(config, self._resources.workload, ranks=machine.ranks, device=machine.device)

    def run(self, command: Time | Losses) -> None:
        """Carries out a command and tells the tuner its result, or why there is none."""
        rank = self._resources
        log_to(command.log_folder)
        rank.meter.reset_peaks()
        rank.progress.phase = "start"
        slot = EngineSlot()
        result: RankResult | LossCurve
        try:
            match command:
                case Time():
                    result = run_trial(command, rank, slot)
                case Losses():
                    result = run_losses(command, rank, slot)
        except Exception as error:
            lift_cap(self._machine)
            traceback.print_exc()
            rank.progress.send(Failed(failure=self._failure(error)))
        else:
            rank.progress.send(Finished(result=result))
        # Only here is the exception gone, and with it what its frames held of the model.
        issued = collectives_issued()
        release_trial(slot.take())
        self._process_wide.restore()
        cap_memory(self._machine)
        held = {"device": rank.meter.held_bytes(), "host": resident_bytes()}
        if self._held_after_first is None:
            self._held_after_first = held
        left = {kind: held[kind] - self._held_after_first[kind] for kind in held}
        rank.progress.send(Released(left_bytes=left, collectives=tuple(issued)))

    def _failure(self, error: Exception) -> Failure:
        phase, rank = self._resources.progress.phase, torch.distributed.get_rank()
        return Failure(
            kind=kind_of_exception(error, phase),
            message=f"rank {rank} in {phase}: {first_sentence(error)}",
            phase=phase,
            rank=rank,
            peak_memory_bytes=self._resources.meter.peak_memory_bytes(),
        )


def main() -> None:
    progress = Progress(int(os.environ.pop("DS_TUNE_EVENT_FD")))
    setup = decode_command(sys.stdin.readline())
    assert isinstance(setup, Setup)
    try:
        worker = Worker(setup.context, progress)
    except DsTuneError as error:
        progress.send(Refused(message=str(error), usage=isinstance(error, UsageError)))
        return
    progress.send(Ready())
    for line in sys.stdin:
        command = decode_command(line)
        assert isinstance(command, Time | Losses)
        worker.run(command)


if __name__ == "__main__":
    main()
