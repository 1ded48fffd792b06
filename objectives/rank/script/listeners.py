"""What a run of a script is for: learning its facts, timing its steps, or taking down its losses."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import deepspeed
import torch

from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.rank.device import Meter
from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.fed import FedSteps
from ds_tune.objectives.rank.knobs import checkpoints_activations, knobs_for
from ds_tune.objectives.rank.micro_batch import MicroBatch
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.rank.result import timed_result
from ds_tune.objectives.rank.script.lengths import SeenLengths
from ds_tune.objectives.rank.script.observer import Observer
from ds_tune.objectives.rank.script.settings import Settings, engine_dtype
from ds_tune.objectives.rank.script.whole_steps import WholeSteps
from ds_tune.objectives.rank.session import MAX_SKIPPED_STEPS, OverflowedError, TimingSession, TooFewWholeStepsError
from ds_tune.objectives.running.protocol import Losses, Time
from ds_tune.objectives.timing.deadlines import warmup_deadline
from ds_tune.objectives.timing.schedule import Timing
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.script_facts import ScriptFacts

LEARNED_STEPS = 2
"""Optimizer steps that the facts are learned from: the second one is past what only a first one does."""

Finish = Callable[[Any], NoReturn]
"""Sends a result and ends the rank."""


class UnreachedError(RuntimeError):
    """The script trains with other settings than the trial has."""


class Listening:
    """What all runs of a script have in common; see `Listener`."""

    def __init__(self, progress: Progress, meter: Meter, *, finish: Finish, fail: Callable[..., Any]) -> None:
        """
        Args:
            finish: given the result; does not return.
            fail: given an exception; does not return.
        """
        self.progress = progress
        self.meter = meter
        self.finish = finish
        self._fail = fail
        self._began = time.perf_counter()
        self.setup_seconds = 0.0
        self.peers = Peers(torch.device("cpu"))
        self.engine: Any = None
        self.rows: Counter[int] = Counter()
        """Micro-batches by their number of rows."""
        self.is_packed = False
        """Whether samples are put into one row, so that rows say nothing of the batch size."""
        self.loader_batch_size: int | None = None
        """Batch size of the DataLoader that was begun last when the engine was first called."""
        self._begun_batch_size: int | None = None
        self.steps = 0

    def engine_made(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.engine = engine
        self.peers = Peers(torch.device("cpu"), group=torch.distributed.new_group(backend="gloo"))
        self.setup_seconds = time.perf_counter() - self._began

    def enter(self, part: str) -> None:
        self.progress.enter(part)

    def data_begun(self, batch_size: int | None) -> None:
        self._begun_batch_size = batch_size

    def fed(self, batch: MicroBatch) -> None:
        if self.steps == 0:  # which is never timed
            self.loader_batch_size = self.loader_batch_size or self._begun_batch_size
            self.is_packed = self.is_packed or batch.is_packed()
        if not batch.is_empty:
            self.rows[batch.rows] += 1

    def loss(self, value: torch.Tensor) -> None:
        pass

    def micro_step_done(self) -> None:
        pass

    def step_done(self, *, skipped: bool) -> None:
        self.steps += 1

    def data_began_again(self) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        self._fail(error)

    def check_settings(self, config: TrialConfig) -> None:
        """
        Raises:
            UnreachedError: the engine or the data is not as the trial has it.
        """
        engine = self.engine
        reached = {
            "ZeRO stage": (config.zero_stage, engine.zero_optimization_stage()),
            "micro-batch size": (config.micro_batch_size, engine.train_micro_batch_size_per_gpu()),
            "gradient accumulation": (config.gradient_accumulation_steps, engine.gradient_accumulation_steps()),
            "batch": (config.micro_batch_size, self.batch_size(config.micro_batch_size)),
        }
        for name, (asked, found) in reached.items():
            if asked != found:
                raise UnreachedError(f"its {name} is {found} where {asked} was asked for")

    def batch_size(self, configured: int) -> int:
        """Samples of a micro-batch as they are fed, where the engine is configured for so many."""
        if not self.is_packed:
            return max(self.rows, default=configured)
        # Accelerate may have one loader deal out to all ranks.
        dealt = (None, configured * torch.distributed.get_world_size())
        return configured if self.loader_batch_size in dealt else self.loader_batch_size or configured


class Learner(Listening):
    """Learns what a script trains, from the script as it stands."""

    def __init__(self, *common: Any, facts: Callable[[Any], ScriptFacts], **more: Any) -> None:
        super().__init__(*common, **more)
        self._facts = facts
        self.lengths = SeenLengths()

    def fed(self, batch: MicroBatch) -> None:
        super().fed(batch)
        self.lengths.add(batch)

    def step_done(self, *, skipped: bool) -> None:
        super().step_done(skipped=skipped)
        if self.steps >= LEARNED_STEPS:
            self.peers.barrier()
            self.finish(self._facts(self))


class Timer(Listening):
    """Times a trial: whole optimizer steps, from the end of one to the end of the next."""

    def __init__(
        self,
        *common: Any,
        command: Time,
        ranks: int,
        flops_per_sample: float,
        facts: ScriptFacts,
        **more: Any,
    ) -> None:
        super().__init__(*common, **more)
        self._command = command
        self._ranks = ranks
        self._flops_per_sample = flops_per_sample
        self._tokens_per_sample = facts.mean_tokens_per_sample
        self.is_packed = facts.is_packed
        self._session: TimingSession | None = None
        self._fed: FedSteps | None = None
        self._steps = WholeSteps(command.config.micro_batch_size * command.config.gradient_accumulation_steps)

    def data_begun(self, batch_size: int | None) -> None:
        super().data_begun(batch_size)
        if self._session is not None:  # not the first time
            self._steps.data_began_again()

    def data_began_again(self) -> None:
        self._steps.data_began_again()

    def fed(self, batch: MicroBatch) -> None:
        super().fed(batch)
        config = self._command.config
        if self._fed is None:
            self._fed = FedSteps(
                self.peers,
                samples_per_step=config.global_batch_size(self._ranks),
                tokens_per_sample=self._tokens_per_sample,
                is_packed=self.is_packed,
            )
            self._session = TimingSession(
                self._timing(), self.meter, self.peers, self.progress, notes=self._fed, leaves_out=True
            )
        self._fed.fed(batch)
        # Of packed samples rows say nothing.
        self._steps.fed(config.micro_batch_size if self.is_packed else batch.rows)

    def _timing(self) -> Timing:
        command, config = self._command, self._command.config
        samples = config.micro_batch_size * config.gradient_accumulation_steps
        best = command.best_samples_per_second
        return Timing(
            plan=command.plan,
            zero_stage=config.zero_stage,
            compile=config.compile,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            predicted_step_seconds=samples * (command.seconds_per_sample or UNKNOWN_SAMPLE_SECONDS),
            best_step_seconds=config.global_batch_size(self._ranks) / best if best else None,
            agree=self.peers.slowest,
            may_shorten=False,
        )

    def enter(self, part: str) -> None:
        super().enter(part)
        if self._session is not None and part in ("forward", "backward", "step"):
            self._session.enter(part)

    def micro_step_done(self) -> None:
        assert self._session is not None
        self._session.micro_step_done()

    def step_done(self, *, skipped: bool) -> None:
        super().step_done(skipped=skipped)
        assert self._session is not None and self._fed is not None
        self._fed.step_done()
        if self.steps == 1:
            try:
                self.check_settings(self._command.config)
            except UnreachedError as error:
                self.failed(error)
        try:
            goes_on = self._session.step_done(skipped=skipped, is_whole=self._steps.step_done())
        except TooFewWholeStepsError as error:
            self.failed(error)
        if goes_on:
            return
        self.peers.barrier()
        self.finish(
            timed_result(
                self._session,
                self.meter,
                self._command.config.gradient_accumulation_steps,
                setup_seconds=self.setup_seconds,
                model_parameters=count_parameters(self.engine.module)[0],
                flops_per_sample=self._flops_per_sample,
                tokens_per_sample=self._tokens_per_sample,
            )
        )


UNKNOWN_SAMPLE_SECONDS = 60.0
"""For the deadline of the first steps, where no trial has told how long a sample takes."""


class LossRecorder(Listening):
    """Takes down the mean loss of each optimizer step, over all ranks and micro-batches."""

    def __init__(self, *common: Any, command: Losses, **more: Any) -> None:
        super().__init__(*common, **more)
        self._wanted = command.steps
        self._compile = command.config.compile
        self._losses: list[float] = []
        self._of_step: list[float] = []
        self._skipped = 0

    def engine_made(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().engine_made(engine)
        turn_off_dropout(engine.module)
        self.progress.announce("numerics", seconds=warmup_deadline(UNKNOWN_SAMPLE_SECONDS, self._wanted, self._compile))

    def loss(self, value: torch.Tensor) -> None:
        self._of_step.append(float(value.detach()))

    def step_done(self, *, skipped: bool) -> None:
        super().step_done(skipped=skipped)
        mean = self.peers.mean(math.fsum(self._of_step) / max(len(self._of_step), 1))
        self._of_step = []
        if skipped:
            self._skipped += 1
            if self._skipped > MAX_SKIPPED_STEPS:
                self.failed(OverflowedError())
            return
        if math.isfinite(mean):
            self._losses.append(mean)
        if len(self._losses) == self._wanted or not math.isfinite(mean):
            self.peers.barrier()
            self.finish(LossCurve(losses=tuple(self._losses), skipped_steps=self._skipped))


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Has a model drop nothing: which activations it drops depends on how a batch is cut into micro-batches."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # handed to a fused attention
                setattr(module, name, 0.0)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters of a model, and how many of them are trained; partitioned ones count whole."""
    sizes = [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def adapter_inputs(model: torch.nn.Module) -> float:
    """Elements a token that a block keeps for peft's adapters, over its hidden size.

    What goes into an adapter is kept for its first matrix's gradient: once for all adapters of a layer that take in the
    same, and once for each where it is dropped out at random, with the mask.
    """
    sizes: dict[tuple[str, int], float] = {}
    for name, module in model.named_modules():
        adapters = getattr(module, "lora_A", None)
        if not isinstance(adapters, torch.nn.ModuleDict):
            continue
        for adapter, matrix in adapters.items():
            dropout = getattr(module, "lora_dropout", {})
            drops = adapter in dropout and getattr(dropout[adapter], "p", 0.0) > 0
            width: int = getattr(matrix, "in_features", 0)
            key = (name if drops else name.rpartition(".")[0], width)
            sizes[key] = width * (1.5 if drops else 1.0)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    hidden, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    return math.fsum(sizes.values()) / (hidden * layers) if hidden and layers else 0.0


def facts_of(listening: Learner, observer: Observer, settings: Settings, *, flags: dict[str, str]) -> ScriptFacts:
    """Facts of a script whose engine has taken some steps."""
    engine = listening.engine
    parameters, trainable = count_parameters(engine.module)
    model_config: Any = getattr(engine.module, "config", None)
    size = engine.train_micro_batch_size_per_gpu()
    ranks = torch.distributed.get_world_size()
    samples = listening.steps * ranks * size * engine.gradient_accumulation_steps()
    return ScriptFacts(
        loop=settings.loop,
        ds_config=settings.written,
        zero_stage=engine.zero_optimization_stage(),
        micro_batch_size=size,
        gradient_accumulation_steps=engine.gradient_accumulation_steps(),
        dtype=engine_dtype(engine),
        parameters=parameters,
        trainable_parameters=trainable,
        model=model_config.to_dict() if hasattr(model_config, "to_dict") else None,
        samples_per_micro_batch=listening.batch_size(size) if listening.is_packed else max(listening.rows, default=0),
        **listening.lengths.facts(listening.peers, samples, is_packed=listening.is_packed),
        micro_batch_flag=flags.get("micro_batch_size"),
        accumulation_flag=flags.get("gradient_accumulation_steps"),
        engines=observer.engines,
        initialized_at=observer.initialized_at,
        loader_follows=observer.loader_follows,
        model_knobs=knobs_for(engine.module, is_loss_alone=settings.is_loss_alone),
        checkpoints_activations=checkpoints_activations(engine.module),
        adapter_inputs=adapter_inputs(engine.module),
        prepare_seconds=listening.setup_seconds,
    )
