"""Choice of the backend that a request asks for. Another way to answer trials is a function and its line here."""

from collections.abc import Callable

from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.tuner.backend import Backend, measured, replayed, simulated
from ds_tune.tuner.request import TuneRequest
from ds_tune.tuner.script_backend import scripted


def backend_for(request: TuneRequest, say: Callable[[str], None]) -> Backend:
    """
    Args:
        say: told in one line what takes a while.

    Raises:
        UsageError: what was asked for cannot be.
        EnvironmentFault: the machine does not say what it has.
    """
    if request.replay is not None:
        return replayed(request, request.replay)
    if request.script:
        return scripted(request, say)
    if request.hardware is not None:
        return simulated(request, parse_hardware(request.hardware, memory_cap_bytes=request.memory_cap_bytes))
    return measured(request, say)
