"""The training of a script, seen from the calls that it makes to its DeepSpeed engine."""

import inspect
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import accelerate
import deepspeed
import torch
import transformers
from torch.utils.data import DataLoader

from ds_tune.objectives.rank.micro_batch import MicroBatch
from ds_tune.objectives.rank.script.laid_on import is_to_train
from ds_tune.objectives.rank.script.replaced import around
from ds_tune.objectives.rank.script.settings import Settings

LIBRARIES = {
    f"{folder}/"
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        # Where they are installed elsewhere, as by `pip install --target`.
        *(Path(str(module.__file__)).parents[1] for module in (accelerate, deepspeed, torch, transformers)),
    )
}


class Listener(Protocol):
    """Whoever wants to know how a script trains. Calls come in the order of a training loop."""

    def engine_made(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """The engine that trains exists, on every rank."""

    def enter(self, part: str) -> None:
        """A part of a micro-step begins: forward, backward, step; or data, which is all else."""

    def data_begun(self, batch_size: int | None) -> None:
        """A DataLoader is iterated from its beginning; None where it makes no batches of one size."""

    def fed(self, batch: MicroBatch) -> None:
        """A micro-batch is about to be given to the engine."""

    def loss(self, value: torch.Tensor) -> None:
        """The loss of the micro-batch, as given to `backward`."""

    def micro_step_done(self) -> None: ...

    def step_done(self, *, skipped: bool) -> None:
        """An optimizer step has ended. Does not return where enough was seen."""

    def failed(self, error: BaseException) -> None:
        """A call of the engine raised. Does not return."""


class Observer:
    """Wraps DeepSpeed so that a listener hears of the engine that trains."""

    def __init__(self, settings: Settings, listener: Listener) -> None:
        self._settings = settings
        self._listener = listener
        self._engine: Any = None
        self._names: Sequence[str] = ()
        """Names of the model's positional arguments."""
        self._in_micro_step = False
        self.engines = 0
        """Engines that were made, those that do not train too."""
        self.loader_follows = False
        """Whether DeepSpeed makes the data loader, of the dataset that it was given."""
        self.initialized_at = ""
        """File and line of the person's code that led to the engine."""

    def install(self) -> None:
        """Called before the script begins."""
        around(deepspeed, "initialize", self._initialize)
        around(deepspeed.DeepSpeedEngine, "forward", self._forward)
        around(deepspeed.DeepSpeedEngine, "backward", self._backward)
        around(deepspeed.DeepSpeedEngine, "step", self._step)
        around(DataLoader, "__iter__", self._iterated)

    def _initialize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trains = is_to_train(args, kwargs)
        self._listener.enter("engine")
        for name in ("config", "config_params"):
            if kwargs.get(name) is not None and trains:
                kwargs[name] = self._settings.engine_config(kwargs[name])
        named = getattr(kwargs.get("args", args[0] if args else None), "deepspeed_config", None)
        if trains and named is not None and kwargs.get("config") is None:
            kwargs["config"] = self._settings.engine_config(named)
            # DeepSpeed takes the file from one place alone.
            if args:
                args = (None, *args[1:])
            else:
                kwargs["args"] = None
        where = person_s_line()
        try:
            made = original(*args, **kwargs)
        except Exception as error:
            self._listener.failed(error)
            raise
        self.engines += 1
        if trains and self._engine is None:
            self._engine, self.initialized_at = made[0], where
            self._names = positional_names(made[0].module)
            self.loader_follows = kwargs.get("training_data") is not None
            self._listener.engine_made(made[0])
        return made

    def is_training(self, engine: Any) -> bool:
        """Whether a call of an engine is a micro-step of the training."""
        return engine is self._engine and bool(engine.module.training) and torch.is_grad_enabled()

    def _forward(self, original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_training(engine):
            return original(engine, *args, **kwargs)
        if self._in_micro_step:
            self._end_micro_step()
        self._in_micro_step = True
        self._listener.fed(MicroBatch(args, kwargs, self._names))
        self._listener.enter("forward")
        return self._call(original, engine, *args, **kwargs)

    def _backward(
        self, original: Callable[..., Any], engine: Any, loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if engine is not self._engine:
            return original(engine, loss, *args, **kwargs)
        # Who forbids DeepSpeed to divide by the accumulation has done it: transformers' Trainer, by the step's tokens.
        is_divided = kwargs.get("scale_wrt_gas", True) is False
        self._listener.loss(loss * engine.gradient_accumulation_steps() if is_divided else loss)
        self._listener.enter("backward")
        return self._call(original, engine, loss, *args, **kwargs)

    def _step(self, original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        if engine is not self._engine:
            return original(engine, *args, **kwargs)
        steps, skipped = engine.global_steps, engine.skipped_steps
        self._listener.enter("step")
        result = self._call(original, engine, *args, **kwargs)
        if self._in_micro_step:
            self._end_micro_step()
        if engine.global_steps > steps:
            self._listener.step_done(skipped=engine.skipped_steps > skipped)
        self._listener.enter("data")
        return result

    def _iterated(self, original: Callable[..., Any], loader: DataLoader[Any]) -> Any:
        sampler = getattr(loader, "batch_sampler", None)
        self._listener.data_begun(loader.batch_size or getattr(sampler, "batch_size", None))
        return original(loader)

    def _end_micro_step(self) -> None:
        self._in_micro_step = False
        self._listener.micro_step_done()

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as error:
            # Told before the script can swallow it, as some do with what runs out of memory.
            self._listener.failed(error)
            raise


def positional_names(model: torch.nn.Module) -> list[str]:
    """Names of the arguments that a model can be given by position."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def person_s_line() -> str:
    """File and line of the innermost frame that is in no library."""
    frame = sys._getframe(1)
    here = str(Path(__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((here, "<")) and not any(file.startswith(folder) for folder in LIBRARIES):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
