"""What every test relies on: DeepSpeed on the CPU, no hub, caches that vanish, no GPU tests where there is no GPU.

Linear algebra has one thread: beside another test, two that wait for each other in a loop take twice the time.

Signals are heeded: under `nohup` or in the background of a script, whatever a test starts would ignore some.

Records and summaries are as a study would have them, made without running one.
"""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

# Read when numpy is imported, which the next imports do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.timing.intervals import throughput
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.identity import Identity
from ds_tune.storage.records import Source, StudySummary, TrialRecord

RIPPLE = (-0.02, 0.01, 0.0, 0.02, -0.01)
VERSIONS = {"python": "3.11.7", "ds-tune": "0.1.0", "deepspeed": "0.19.8", "torch": "2.13.0"}


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports DeepSpeed, transformers or datasets, here or in a rank that a test starts.
    if shutil.which("nvidia-smi") is None:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ds-tune-tests-hf-")
    heeded = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in heeded.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def plain_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a launch without ds-tune: DeepSpeed compiles an op for CPU ranks, here once for all tests and
    without optimizing it, which takes longer than all else."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    compiler = shared / "plain" / "c++"  # one name for all: with another, the op would be compiled again
    part = compiler.with_name(f"{compiler.name}.{os.getpid()}")
    part.parent.mkdir(exist_ok=True)
    part.write_text('#!/bin/sh\nexec c++ "$@" -O0 -g0\n')
    part.chmod(0o755)
    part.rename(compiler)
    return {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(compiler.with_name("extensions"))}


@pytest.fixture
def machine() -> Machine:
    return Machine(
        device="cuda",
        name="NVIDIA H200",
        ranks=2,
        device_ids=(0, 1),
        memory_bytes=140 * GIB,
        memory_cap_bytes=24 * GIB,
        compute_capability="9.0",
    )


@pytest.fixture
def identity(workload: HuggingFaceWorkload, machine: Machine) -> Identity:
    return Identity(objective="samples_per_second", workload=workload, machine=machine, space={"global_batch": None})


@pytest.fixture
def workload() -> HuggingFaceWorkload:
    return HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")


def named_config(name: str) -> TrialConfig:
    """The configuration that DeepSpeed's autotuner gives this name."""
    match = re.fullmatch(r"z(\d)_gas(\d+)_tmbspg(\d+)", name)
    assert match
    return TrialConfig(
        zero_stage=int(match[1]), gradient_accumulation_steps=int(match[2]), micro_batch_size=int(match[3])
    )


def measurement(config: TrialConfig, ranks: int, samples_per_second: float, peak_bytes: int) -> Measurement:
    samples = config.global_batch_size(ranks)
    step_seconds = tuple(samples / samples_per_second * (1 + ripple) for ripple in RIPPLE)
    rate, interval = throughput(step_seconds, samples)
    mean = samples / samples_per_second
    return Measurement(
        step_seconds=step_seconds,
        samples_per_second=rate,
        samples_per_second_ci95=interval,
        forward_seconds=0.25 * mean,
        backward_seconds=0.5 * mean,
        optimizer_seconds=0.125 * mean,
        deepspeed_samples_per_second=rate * 1.1,
        warmup_step_seconds=(2 * mean, 1.2 * mean),
        skipped_steps=0,
        peak_memory_bytes=peak_bytes,
        reserved_memory_bytes=peak_bytes + GIB,
        alloc_retries=0,
        setup_seconds=12.5,
        wall_seconds=20.0,
        model_parameters=1_557_611_200,
        flops_per_sample=1.0e13,
    )


@pytest.fixture
def make_record(machine: Machine) -> Callable[..., TrialRecord]:
    """`make_record("z1_gas2_tmbspg4", 40.0)`; without a throughput the trial ended as `kind` says."""

    def make(
        name: str,
        samples_per_second: float | None = None,
        *,
        number: int = 0,
        source: Source = Source.SEARCH,
        kind: FailureKind = FailureKind.OUT_OF_MEMORY,
        message: str = "rank 1 in forward: OutOfMemoryError: CUDA out of memory",
        peak_gib: float | None = 12.0,
        machine: Machine = machine,
    ) -> TrialRecord:
        config = named_config(name)
        peak_bytes = None if peak_gib is None else round(peak_gib * GIB)
        outcome: Outcome
        if samples_per_second is not None:
            outcome = measurement(config, machine.ranks, samples_per_second, peak_bytes or GIB)
        else:
            outcome = Failure(
                kind=kind,
                message=message,
                phase="forward",
                rank=1,
                peak_memory_bytes=peak_bytes,
                log_tail="Traceback (most recent call last):\n  the last lines of the log",
                wall_seconds=7.5,
            )
        return TrialRecord(
            number=number,
            config=config,
            outcome=outcome,
            source=source,
            started_at="2026-11-23T04:42:00+00:00",
            machine=machine,
            versions=VERSIONS,
        )

    return make


@pytest.fixture
def make_summary(machine: Machine, workload: HuggingFaceWorkload) -> Callable[..., StudySummary]:
    def make(records: Sequence[TrialRecord], *, total: int | None = None, **changes: Any) -> StudySummary:
        summary: dict[str, Any] = {
            "study": "ds-tune",
            "workload": workload,
            "machine": machine,
            "versions": VERSIONS,
            "trials_total": len(records) if total is None else total,
            "tuning_seconds": 1255.156,
            "ended": None,
            "records": records,
        }
        return StudySummary(**{**summary, **changes})

    return make


@pytest.fixture
def finished(make_record: Callable[..., TrialRecord], make_summary: Callable[..., StudySummary]) -> StudySummary:
    """A baseline, something faster, something out of memory, and a crash that does not count."""
    records = [
        make_record("z0_gas1_tmbspg1", 27.5, number=0, source=Source.BASELINE, peak_gib=23.0),
        make_record("z1_gas2_tmbspg8", 58.25, number=1, peak_gib=20.5),
        make_record("z1_gas1_tmbspg4", 40.0, number=2, peak_gib=16.0),
        make_record("z3_gas1_tmbspg64", number=3, peak_gib=24.0),
        make_record("z2_gas1_tmbspg2", number=4, kind=FailureKind.CRASH, message="rank 0 | was killed by SIGSEGV"),
    ]
    return make_summary(records, total=4)


@pytest.fixture
def nothing_fits(make_record: Callable[..., TrialRecord], make_summary: Callable[..., StudySummary]) -> StudySummary:
    records = [
        make_record(f"z{stage}_gas1_tmbspg1", number=stage, source=Source.BASELINE, peak_gib=24.0) for stage in range(4)
    ]
    return make_summary(records, total=9, ended="not even one sample a rank fits, in any ZeRO stage")


@pytest.fixture
def empty(make_summary: Callable[..., StudySummary]) -> StudySummary:
    return make_summary([], total=9, tuning_seconds=0.0)
