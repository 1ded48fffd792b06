"""Data that ends before a trial does: the loader that feeds the training begins again.

The Trainer does that by itself, as its `max_steps` is lifted. Loops of a script's own, and Accelerate's, end with their
loader, some before enough steps are timed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from torch.utils.data import DataLoader

from ds_tune.objectives.rank.script.listeners import Listening
from ds_tune.objectives.rank.script.observer import Observer
from ds_tune.objectives.rank.script.replaced import around
from ds_tune.objectives.rank.script.settings import Settings
from ds_tune.objectives.workload.script_facts import TRAINER

ACCUMULATIONS_WITHOUT_A_STEP = 4
"""Times the gradient accumulation: a script that fed so many micro-batches without a step waits for its data to end."""


class Loaders:
    """All DataLoaders of a script, and which of them feeds its training."""

    def __init__(
        self, settings: Settings, observer: Observer, listener: Listening, *, ended: Callable[[int], None]
    ) -> None:
        """
        Args:
            ended: told after how many optimizer steps the data ended for the first time.
        """
        self._settings = settings
        self._observer = observer
        self._listener = listener
        self._ended = ended
        self._has_ended = False
        self._waiting: list[Passes] = []
        """Those that have given a batch since the engine was called last."""
        self._steps = 0
        self._micro_steps = 0
        """Micro-batches that were trained on since the last step."""

    def install(self) -> None:
        """Called before the script begins, after the observer's `install`."""
        around(DataLoader, "__iter__", self._iterated)
        around(deepspeed.DeepSpeedEngine, "forward", self._forward)

    def _iterated(self, original: Callable[..., Any], loader: DataLoader[Any]) -> "Passes":
        return Passes(self, lambda: original(loader))

    def gave(self, passes: "Passes") -> None:
        """A batch is on its way to wherever."""
        if passes not in self._waiting:
            self._waiting.append(passes)

    def _forward(self, original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        if self._observer.is_training(engine):
            for passes in self._waiting:
                passes.feeds = True
            if self._listener.steps > self._steps:
                self._steps, self._micro_steps = self._listener.steps, 0
            self._micro_steps += 1
        self._waiting.clear()  # what an evaluation was fed trains nothing
        return original(engine, *args, **kwargs)

    def begins_again(self, passes: "Passes") -> bool:
        """Whether a loader that has come to its end is to go on: in training, which it feeds, and which makes steps."""
        engine = self._listener.engine
        if self._settings.loop == TRAINER or engine is None or not passes.feeds:
            return False
        if not (engine.module.training and torch.is_grad_enabled()):
            return False
        if self._micro_steps > ACCUMULATIONS_WITHOUT_A_STEP * engine.gradient_accumulation_steps():
            return False
        if not self._has_ended:
            self._has_ended = True
            self._ended(self._listener.steps)
        self._listener.data_began_again()
        return True


class Passes:
    """Iterator of a DataLoader, over as many passes through its data as a trial takes."""

    def __init__(self, loaders: Loaders, begin: Callable[[], Iterator[Any]]) -> None:
        self._batches = begin()
        self._begin = begin
        self._loaders = loaders
        self._is_over = False
        self.feeds = False
        """Whether the engine was trained on a batch of this pass."""

    def __iter__(self) -> "Passes":
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._is_over = self._is_over or not self._loaders.begins_again(self)
            if self._is_over:
                raise
            self.feeds = False
            self._batches = self._begin()
            batch = next(self._batches)
        self._loaders.gave(self)
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
