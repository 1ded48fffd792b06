"""Words for what a script raised: the sentence, the place, and its traceback without what ran the script."""

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ds_tune.objectives.errors import DsTuneError
from ds_tune.objectives.rank.script.observer import LIBRARIES
from ds_tune.objectives.running.failures import first_sentence

HERE = str(Path(__file__).parent)

UNREACHED = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ConnectionError"}
"""Names of what huggingface_hub, datasets and what they connect with raise where there is no hub to be had."""

ON_ITS_WAY = {"repo_id": "huggingface_hub", "path_or_repo_id": "transformers"}
"""Variables that hold what is asked of the hub, and whose functions have them."""


def sentence_of(error: BaseException) -> str:
    """An exception on one line; where a person has to do something outside of the script, what."""
    if isinstance(error, DsTuneError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            return f"it needs the package {package}, which is not installed in {sys.executable}"
    if any(type(each).__name__ in UNREACHED for each in _chain(error)) and (wanted := _wanted_of_the_hub(error)):
        return (
            f"it needs {wanted} from the hub, which cannot be reached: download it first, or set HF_HOME to the folder "
            "that holds it"
        )
    return first_sentence(error)


def place_of(error: BaseException) -> str:
    """What was raised, and where: `IndexError in _init_weights, train.py:9`; nothing for what ds-tune raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    if not frames or isinstance(error, DsTuneError) or type(error).__module__.startswith("ds_tune."):
        return ""
    name = type(error).__name__
    within = f" in {frames[-1].name}" if frames[-1].name != "<module>" else ""
    own = [frame for frame in frames if not any(frame.filename.startswith(folder) for folder in LIBRARIES)]
    where = f", {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{name}{within}{where}"


def print_traceback(error: BaseException) -> None:
    """Prints what the interpreter would have; nothing for what ds-tune says in a sentence."""
    if isinstance(error, DsTuneError):
        return
    told = traceback.TracebackException.from_exception(error)
    links: list[traceback.TracebackException | None] = [told]
    while links:
        if (link := links.pop()) is not None:
            frames = [frame for frame in link.stack if not _is_ours(frame.filename)]
            link.stack = traceback.StackSummary.from_list(frames)
            links += [link.__cause__, link.__context__]
    print("".join(told.format()), end="", file=sys.stderr)


def _is_ours(file: str) -> bool:
    return file.startswith((HERE, "<frozen runpy>"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _wanted_of_the_hub(error: BaseException) -> str | None:
    """Name of the repository that a library was loading."""
    for each in _chain(error):
        trace: TracebackType | None = each.__traceback__
        while trace is not None:
            module = str(trace.tb_frame.f_globals.get("__name__", ""))
            for variable, package in ON_ITS_WAY.items():
                if module.startswith(package) and isinstance(name := trace.tb_frame.f_locals.get(variable), str):
                    return name
            trace = trace.tb_next
    return None
