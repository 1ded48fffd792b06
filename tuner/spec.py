"""StudySpec: a request as it comes out on this machine, checked before anything runs or is written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.host_memory import host_memory_bytes
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.metric import check_metric
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.urls import check_storage_url
from ds_tune.tuner.backend import Backend
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.request import SearchRequest, TuneRequest
from ds_tune.tuner.rescue import Rescue, rescued
from ds_tune.tuner.space import Space, study_space
from ds_tune.tuner.space_file import SpaceFile


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """Everything that decides what a run of the tuner does."""

    request: TuneRequest
    backend: Backend
    space: Space
    hint: str | None = None
    """Where nothing is predicted to fit with all that saves memory: what it would take."""
    notes: Sequence[str] = ()
    """Lines for the person about the space, before the study begins."""
    results: ResultsFolder
    storage_url: str


def make_spec(request: TuneRequest, backend: Backend) -> StudySpec:
    """
    Raises:
        UsageError: something asked for cannot be; nothing was run yet, and nothing written but an empty folder.
    """
    check_metric(request.metric, backend.workload, backend.machine)
    rescue = search_space(
        request,
        backend.limits,
        workload=backend.workload,
        machine=backend.machine,
        recorded=backend.restricted_to,
        own=backend.own,
        host_bytes=host_memory_bytes() if backend.verifies else None,
    )
    if request.storage is not None:
        check_storage_url(request.storage)
    results = results_folder(request.results)
    return StudySpec(
        request=request,
        backend=backend,
        space=rescue.space,
        hint=rescue.hint,
        notes=[rescue.said] if rescue.said else [],
        results=results,
        storage_url=request.storage or results.storage_url,
    )


def search_space(
    request: SearchRequest,
    limits: Limits,
    *,
    workload: Workload,
    machine: Machine,
    recorded: Sequence[TrialConfig] | None = None,
    own: TrialConfig | None = None,
    host_bytes: int | None = None,
) -> Rescue:
    """The space of a study, with what saves memory where nothing would fit without.

    Args:
        recorded: the only configurations that can be answered.
        own: the configuration that a person trains with today.
        host_bytes: the host's memory that may be had; None where it is not known.

    Raises:
        UsageError: no configuration is left, or the request's file is not to be understood.
    """
    restricted_to = recorded
    if request.space is not None:
        limits.check()
        context = knob_context_of(workload, machine)
        restricted_to = SpaceFile.read(request.space).configurations(limits, context, request.allowed, own)
    space = study_space(
        limits,
        preset=request.preset or "core",
        allowed=request.allowed,
        workload=workload,
        machine=machine,
        restricted_to=restricted_to,
        own=own,
        with_untuned=request.ds_config is not None,
    )
    if recorded is not None:
        return Rescue(space=space)
    return rescued(
        space,
        preset=request.preset or "core",
        allowed=request.allowed,
        workload=workload,
        machine=machine,
        listed=restricted_to is not None,
        host_bytes=host_bytes,
    )


def results_folder(path: Path, *, field: str = "results") -> ResultsFolder:
    """The folder for results, checked before anything runs.

    Args:
        field: name of what named it, for the message.

    Raises:
        UsageError: it is a file or cannot be written to, or something in it is in the way.
    """
    folder = ResultsFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"`{field}={path}` cannot be written to ({error.strerror}); name another folder") from error
    in_the_way = folder.in_the_way()
    if in_the_way is not None:
        kind = "a folder" if in_the_way.is_dir() else "no folder"
        raise UsageError(
            f"`{field}={path}` cannot be used: {in_the_way} is {kind}; move it away or name another folder"
        )
    return folder
