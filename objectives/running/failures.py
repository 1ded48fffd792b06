"""The only place that decides out_of_memory | invalid_config | timeout | crash.

Three kinds of evidence: the exception a rank caught, the way a rank died, and the deadline that passed.
"""

import re
import signal
from collections.abc import Iterable, Sequence

from ds_tune.objectives.trial import Failure, FailureKind

# What the layers under torch say when memory is gone. Matched against exception texts, and against the last
# lines of the log of a rank that died without a word, where a C++ library aborted the process.
_OUT_OF_MEMORY_TEXT = re.compile(
    r"out of memory"  # CUDA, torch.OutOfMemoryError
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|std::bad_alloc"
    r"|Cannot allocate memory"  # errno ENOMEM, in whoever's words
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|failed to allocate"
    r"|unable to mmap .* bytes"
    r"|cannot map zero-fill pages"  # the dynamic linker's, of a library's variables
    # A resource limit leaves no room for a thread's stack: Python's, OpenMP's and C++'s words.
    r"|can't start new thread|Thread creation failed"
    r"|(?:^|what\(\): +|RuntimeError: )Resource temporarily unavailable$"
    # CPython's words where its own C code could not allocate, in the middle of an import, and said nothing.
    r"|error return without exception set"
    r"|Cannot recover from MemoryErrors"  # and where it could not even make the exception
    r"|^MemoryError\b",  # the traceback of a rank that died before it could report
    re.IGNORECASE | re.MULTILINE,
)

# What a rank reads when the peer it talks to is gone: a consequence, never the cause.
_PEER_GONE_TEXT = re.compile(
    r"Connection (?:reset|closed) by (?:remote )?peer|Broken pipe|remote process exit|ncclRemoteError", re.IGNORECASE
)

# What DeepSpeed and pydantic raise for a configuration that no machine could run.
_INVALID_CONFIG_TYPES = frozenset({"ValidationError", "DeepSpeedConfigError", "JSONDecodeError"})

# How Python says that an optimizer or a scheduler has other parameters than the configuration names, or is none.
_REFUSED_ARGUMENT_TEXT = re.compile(
    r"got an unexpected keyword argument|missing \d+ required (?:positional|keyword)"
    r"|module 'torch\.optim\S*' has no attribute"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        names = {kind.__name__ for kind in type(seen).__mro__}
        if names & {"OutOfMemoryError", "MemoryError"} or _OUT_OF_MEMORY_TEXT.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def kind_of_exception(error: BaseException, phase: str) -> FailureKind:
    """Kind of an exception that a rank caught in `phase`: what it says about the configuration."""
    if is_out_of_memory(error):
        return FailureKind.OUT_OF_MEMORY
    refused = {kind.__name__ for kind in type(error).__mro__} & _INVALID_CONFIG_TYPES
    # DeepSpeed checks what its pydantic models cannot with bare asserts: settings that exclude each other.
    refused |= {"assert"} if isinstance(error, AssertionError | ValueError) and "deepspeed" in _origin(error) else set()
    refused |= {"argument"} if _REFUSED_ARGUMENT_TEXT.search(str(error)) else set()
    if phase == "config" or (phase == "engine" and refused):
        return FailureKind.INVALID_CONFIG
    return FailureKind.CRASH


def _origin(error: BaseException) -> str:
    """The file that raised the exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename if trace is not None else ""


def first_sentence(error: BaseException) -> str:
    """An exception on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3]) if lines else "(no message)"
    return f"{type(error).__name__}: {text[:300]}"


def failure_of_exit(returncode: int, *, rank: int, phase: str, log_tail: str, host_oom_kills: int) -> Failure:
    """Why a rank that left without a result did so.

    Args:
        returncode: as `subprocess` gives it: minus the signal's number for a rank that a signal killed.
        host_oom_kills: processes the kernel killed for memory on this machine while the trial ran.
    """
    how = f"exited with status {returncode}"
    if returncode < 0:
        names = {known.value: known.name for known in signal.Signals}
        how = f"was killed by {names.get(-returncode, f'signal {-returncode}')}"
    kind = FailureKind.CRASH
    if returncode == -signal.SIGKILL and host_oom_kills > 0:
        kind, how = FailureKind.OUT_OF_MEMORY, "was killed by the kernel because the host ran out of memory"
    elif _OUT_OF_MEMORY_TEXT.search(log_tail):
        kind, how = FailureKind.OUT_OF_MEMORY, f"{how} when an allocation failed"
    return Failure(kind=kind, message=f"rank {rank} {how} in {phase}", phase=phase, rank=rank, log_tail=log_tail)


def failure_of_deadline(seconds: float, *, phases: Sequence[str], log_tail: str) -> Failure:
    """A trial that was killed at its deadline, with where each rank stood."""
    where = ", ".join(f"rank {rank} in {phase}" for rank, phase in enumerate(phases))
    message = f"not finished after {seconds:.0f} s ({where}); killed"
    return Failure(kind=FailureKind.TIMEOUT, message=message, phase=phases[0], log_tail=log_tail)


def root_cause(failures: Iterable[Failure]) -> Failure:
    """The one failure of several ranks that explains the others.

    When one rank runs out of memory or dies, its peers see a broken connection: memory comes first, then what
    DeepSpeed refused; among equals one that saw no broken connection, then the lowest rank.
    """
    order = [FailureKind.OUT_OF_MEMORY, FailureKind.INVALID_CONFIG, FailureKind.CRASH, FailureKind.TIMEOUT]
    return min(failures, key=lambda failure: (order.index(failure.kind), bool(_PEER_GONE_TEXT.search(failure.message))))
