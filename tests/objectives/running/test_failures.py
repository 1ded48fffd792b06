"""What a failure was: out of memory, an invalid configuration, a crash or a timeout."""

import signal

import pytest

from ds_tune.objectives.running.failures import (
    failure_of_deadline,
    failure_of_exit,
    first_sentence,
    is_out_of_memory,
    kind_of_exception,
    root_cause,
)
from ds_tune.objectives.trial import Failure, FailureKind


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        SystemError("error return without exception set"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("unable to mmap 4096 bytes from file </model.safetensors>: Cannot allocate memory (12)"),
        ImportError("libtorch_cpu.so: cannot map zero-fill pages"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),  # std::thread without room for its stack
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_every_layer_s_way_to_say_that_memory_is_gone_is_understood(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert kind_of_exception(error, "backward") == FailureKind.OUT_OF_MEMORY


def test_memory_that_ran_out_underneath_another_error_is_found() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise RuntimeError("the optimizer could not be built") from cause
    except RuntimeError as error:
        assert is_out_of_memory(error)


def test_an_error_of_the_program_is_a_crash() -> None:
    assert kind_of_exception(RuntimeError("boom"), "forward") == FailureKind.CRASH
    assert kind_of_exception(ValueError("mine, not DeepSpeed's"), "engine") == FailureKind.CRASH


def test_value_error_in_the_config_phase_is_an_invalid_config_failure() -> None:
    assert kind_of_exception(ValueError("stage must be 0 to 3"), "config") == FailureKind.INVALID_CONFIG


@pytest.mark.parametrize(
    "error",
    [
        TypeError("AdamW.__init__() got an unexpected keyword argument 'bias_correction'"),
        TypeError("WarmupDecayLR.__init__() missing 1 required positional argument: 'total_num_steps'"),
        AttributeError("module 'torch.optim' has no attribute 'AdamX'"),
    ],
    ids=str,
)
def test_parameter_that_an_optimizer_or_scheduler_lacks_is_an_invalid_config_failure(error: Exception) -> None:
    assert kind_of_exception(error, "engine") == FailureKind.INVALID_CONFIG
    assert kind_of_exception(error, "forward") == FailureKind.CRASH


def test_running_out_of_memory_while_the_configuration_is_read_is_still_that() -> None:
    assert kind_of_exception(MemoryError(), "config") == FailureKind.OUT_OF_MEMORY


def test_an_exception_is_shown_on_one_line() -> None:
    assert first_sentence(ValueError("first\n\n  second  \nthird\nfourth")) == "ValueError: first second third"
    assert first_sentence(KeyError()) == "KeyError: (no message)"
    assert len(first_sentence(ValueError("x" * 5000))) < 400


def died(returncode: int, *, log_tail: str = "", host_oom_kills: int = 0) -> Failure:
    return failure_of_exit(returncode, rank=1, phase="warm-up", log_tail=log_tail, host_oom_kills=host_oom_kills)


def test_a_rank_that_exits_is_a_crash_with_its_status() -> None:
    failure = died(3, log_tail="its last words")
    assert failure.kind == FailureKind.CRASH
    assert failure.message == "rank 1 exited with status 3 in warm-up"
    assert (failure.rank, failure.phase, failure.log_tail) == (1, "warm-up", "its last words")


def test_a_rank_that_a_signal_killed_is_a_crash_with_the_signal_s_name() -> None:
    assert died(-signal.SIGSEGV).kind == FailureKind.CRASH
    assert died(-signal.SIGSEGV).message == "rank 1 was killed by SIGSEGV in warm-up"
    assert died(-signal.SIGKILL).kind == FailureKind.CRASH


def test_a_real_time_signal_has_a_number_only() -> None:
    assert "signal 40" in died(-40).message


def test_a_rank_that_the_kernel_killed_for_memory_ran_out_of_it() -> None:
    failure = died(-signal.SIGKILL, host_oom_kills=1)
    assert failure.kind == FailureKind.OUT_OF_MEMORY
    assert "the host ran out of memory" in failure.message


@pytest.mark.parametrize(
    "words",
    [
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "Fatal Python error: _PyErr_NormalizeException: Cannot recover from MemoryErrors while normalizing exceptions.",
    ],
)
def test_a_rank_that_aborted_because_an_allocation_failed_ran_out_of_memory(words: str) -> None:
    assert died(-signal.SIGABRT, log_tail=words).kind == FailureKind.OUT_OF_MEMORY


def test_a_rank_that_died_of_a_memory_error_before_it_could_report_ran_out_of_memory() -> None:
    traceback = 'Traceback (most recent call last):\n  File "worker.py", line 3, in <module>\nMemoryError'
    assert died(1, log_tail=traceback).kind == FailureKind.OUT_OF_MEMORY


def test_a_rank_that_died_explains_the_broken_connection_of_a_lower_one() -> None:
    words = "rank 0 in backward: RuntimeError: [pair.cc:537] Read error [127.0.0.1]:5517: Connection reset by peer."
    peer = Failure(kind=FailureKind.CRASH, message=words, phase="backward", rank=0)
    assert root_cause([peer, died(-signal.SIGSEGV)]).rank == 1


def test_a_deadline_tells_where_each_rank_stood() -> None:
    failure = failure_of_deadline(30, phases=["warm-up", "engine"], log_tail="tail")
    assert failure.kind == FailureKind.TIMEOUT
    assert failure.message == "not finished after 30 s (rank 0 in warm-up, rank 1 in engine); killed"
    assert failure.log_tail == "tail"


def test_the_rank_that_ran_out_of_memory_explains_what_its_peers_saw() -> None:
    def failure(kind: FailureKind, rank: int) -> Failure:
        return Failure(kind=kind, message="", phase="backward", rank=rank)

    crash = failure(FailureKind.CRASH, 0)
    refused = failure(FailureKind.INVALID_CONFIG, 1)
    memory = failure(FailureKind.OUT_OF_MEMORY, 2)
    assert root_cause([crash, refused, memory]).rank == 2
    assert root_cause([crash, refused]).rank == 1
