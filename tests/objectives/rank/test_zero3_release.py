"""What ZeRO-3 releases behind each module: the same as DeepSpeed finds, without its walks through all modules."""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from ds_tune.objectives.rank import zero3_release
from ds_tune.objectives.rank.zero3_release import METHOD, TraceIndex, install


@pytest.fixture
def installed() -> Iterator[Any]:
    """Gives DeepSpeed's own method."""
    theirs = getattr(PartitionedParameterCoordinator, METHOD)
    install()
    yield theirs
    setattr(PartitionedParameterCoordinator, METHOD, theirs)


def train(engine: deepspeed.DeepSpeedEngine, micro_steps: int) -> None:
    ids = torch.randint(501, (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(micro_steps):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


# Elements that may be needed again before a parameter is kept: all of this model's, a few blocks', none.
@pytest.mark.parametrize("live_elements", [10**9, 40_000, 1])
# Smaller parameters stay gathered: DeepSpeed's default leaves none of this model's to release.
@pytest.mark.parametrize("persistent_elements", [1, 2_000])
@pytest.mark.parametrize("activation_checkpointing", [0, 1])
def test_the_answers_are_deepspeeds(
    live_elements: int,
    persistent_elements: int,
    activation_checkpointing: int,
    installed: Any,
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[set[int]] = []
    ours = zero3_release.params_to_release

    def compared(coordinator: Any, submodule: torch.nn.Module, step_id: int) -> set[int]:
        found = ours(coordinator, submodule, step_id)
        assert found == set(installed(coordinator, submodule, step_id))
        answers.append(set(found))
        return found

    monkeypatch.setattr(zero3_release, "params_to_release", compared)
    engine = engine_of(
        3,
        live_elements=live_elements,
        persistent_elements=persistent_elements,
        activation_checkpointing=activation_checkpointing,
    )
    train(engine, 3)
    assert len(answers) > 100, "it was never asked"
    assert len({frozenset(answer) for answer in answers}) > 1 or live_elements == 10**9


def test_the_trace_is_walked_once_and_not_once_a_module(
    installed: Any, engine_of: Callable[..., deepspeed.DeepSpeedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    walked = 0
    iter_params = partitioned_param_coordinator.iter_params

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal walked
        walked += 1
        return iter_params(*arguments, **named)

    monkeypatch.setattr(partitioned_param_coordinator, "iter_params", counted)
    engine = engine_of(3)
    train(engine, 2)
    modules = len(list(engine.module.modules()))
    assert walked < 20 * modules
    assert len(TraceIndex.of([]).uses) == 0


def test_a_trace_that_changes_is_indexed_anew(
    installed: Any, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    """DeepSpeed records it again when other modules run than it has seen."""
    engine = engine_of(3, live_elements=40_000, persistent_elements=1)
    train(engine, 3)
    with torch.no_grad():
        engine.eval()
        engine(input_ids=torch.zeros(2, 16, dtype=torch.long))
        engine.train()
    train(engine, 4)


def test_zero_3_release_is_installed_once_and_its_cache_is_cleared_with_the_trial(installed: Any) -> None:
    from ds_tune.objectives.rank.cleanup import _method_caches

    method = getattr(PartitionedParameterCoordinator, METHOD)
    install()
    assert getattr(PartitionedParameterCoordinator, METHOD) is method
    assert method.cache_clear in list(_method_caches(PartitionedParameterCoordinator))
