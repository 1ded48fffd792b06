"""Reads a recorded surface: what every configuration of a grid did on one machine. docs/surfaces.md has the format."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.timing.intervals import throughput
from ds_tune.objectives.trial import KNOBS, Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.objectives.words import shown
from ds_tune.objectives.workload.huggingface import DTYPES, HuggingFaceWorkload

LARGEST = 2**20
"""Beyond it a number is a slip of the pen: no such batch, no such number of ranks, no device of so many GiB."""

MOST_SECONDS = 10**9
"""Thirty years."""

MOST_SAMPLES_PER_SECOND = 10**12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """How a line says one field of a `TrialConfig`."""

    field: str
    lowest: int
    highest: int = LARGEST


KEYS = {
    "stage": Key(field="zero_stage", lowest=0, highest=3),
    "mbs": Key(field="micro_batch_size", lowest=1),
    "gas": Key(field="gradient_accumulation_steps", lowest=1),
    "ckpt": Key(field="activation_checkpointing", lowest=0),
}
"""The keys of a line that make its configuration; every line has these. Other knobs stand under their field's name, and
are off where a line does not have them."""

TOLERANCE = 0.05
"""Figures of one line that say the same thing may differ by rounding, not by another number of ranks."""

_HARDWARE = re.compile(r"([0-9]{1,7})x(\S.*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording: outcomes, and the machine and training that they are of."""

    machine: Machine
    """Its memory is what a rank was allowed."""
    workload: HuggingFaceWorkload
    versions: Mapping[str, str]
    outcomes: Mapping[TrialConfig, Outcome]
    """In the order of the file: measurements, and configurations that ran out of memory."""
    repeated: int = 0
    """Lines left out because an earlier one has the same configuration."""
    crashed: int = 0
    """Lines left out because they say nothing about their configuration: crashes and timeouts."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells one recording from another, whatever the file is called."""
        points = [[config.to_json(), outcome.to_json()] for config, outcome in self.outcomes.items()]
        document = [self.machine.to_json(), self.workload.to_json(), points]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


class _Malformed(Exception):
    """Fault of a line, in words for the person who has the file."""


@contextlib.contextmanager
def _line(path: Path, number: int) -> Iterator[None]:
    """Says of which line it is that something is wrong."""
    try:
        yield
    except _Malformed as error:
        raise UsageError(f"`replay={path}`, line {number}: {error}; docs/surfaces.md has the format") from None


def read_recording(path: Path) -> Recording:
    """Reads a file of JSON lines: a header, then a line a configuration.

    Raises:
        UsageError: it cannot be read, a line is malformed (the text has its number), or no configuration is left.
    """
    try:
        # Not splitlines, which also splits at characters that may stand in a JSON text.
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    except OSError as error:
        raise UsageError(f"`replay={path}` cannot be read ({error.strerror}); name a recorded surface") from error
    except UnicodeDecodeError:
        raise UsageError(f"`replay={path}` is not text; name a recorded surface") from None
    with _line(path, 1):
        if lines == [""]:
            raise _Malformed("the file is empty; its first line says what was recorded on what")
        machine, workload, versions = _header(_document(lines[0]))
    outcomes: dict[TrialConfig, Outcome] = {}
    repeated = crashed = 0
    for number, text in enumerate(lines[1:], start=2):
        if not text.strip():
            continue
        with _line(path, number):
            line = _document(text)
            config, outcome = _configuration(line), _outcome(line, machine.ranks)
        if outcome is None:
            crashed += 1
        elif config in outcomes:
            repeated += 1
        else:
            outcomes[config] = outcome
    if not outcomes:
        raise UsageError(
            f"`replay={path}` has no configuration to replay; record some with benchmarks/record_surface.py"
        )
    return Recording(
        machine=machine, workload=workload, versions=versions, outcomes=outcomes, repeated=repeated, crashed=crashed
    )


def _header(line: Mapping[str, Any]) -> tuple[Machine, HuggingFaceWorkload, Mapping[str, str]]:
    hardware = _text(line, "hardware")
    ranks = _integer(line, "ranks", lowest=1)
    match = _HARDWARE.fullmatch(hardware)
    if match is None:
        raise _Malformed(f"hardware is {shown(hardware)}, not of the form 2xH200 or 2xCPU")
    if int(match[1]) != ranks:
        raise _Malformed(f"hardware is {hardware}, but ranks is {ranks}")
    dtype = _text(line, "dtype")
    if dtype not in DTYPES:
        raise _Malformed(f"dtype {shown(dtype)} is none of {', '.join(DTYPES)}")
    versions = line.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise _Malformed("versions is not an object of texts")
    for text in (*versions, *versions.values()):
        _check_printable("versions", text)
    on_cpu = match[2].upper() == "CPU"
    machine = Machine(
        device="cpu" if on_cpu else "cuda",
        name=match[2],
        ranks=ranks,
        device_ids=() if on_cpu else tuple(range(ranks)),
        memory_bytes=_bytes(line, "memory_cap_gib"),
    )
    workload = HuggingFaceWorkload(model=_text(line, "model"), seq_len=_integer(line, "seq_len", lowest=2), dtype=dtype)
    return machine, workload, versions


def _configuration(line: Mapping[str, Any]) -> TrialConfig:
    fields: dict[str, Any] = {
        each.field: _integer(line, key, lowest=each.lowest, highest=each.highest) for key, each in KEYS.items()
    }
    for field, knob in KNOBS.items():
        if field in line and field not in fields:
            try:
                fields[field] = knob.checked(field, line[field])
            except ValueError as error:
                raise _Malformed(str(error)) from None
    return TrialConfig(**fields)


def _outcome(line: Mapping[str, Any], ranks: int) -> Outcome | None:
    """Outcome that a line tells; None for a crash, which says nothing about its configuration."""
    out_of_memory = _value(line, "oom", bool, "true or false")
    trial_s = _positive(line, "trial_s")
    failure = _text(line, "failure") if line.get("failure") is not None else None
    if failure is not None and failure not in tuple(FailureKind):
        raise _Malformed(f"failure is {shown(failure)}, none of {', '.join(FailureKind)}")
    if failure is not None and out_of_memory != (failure == FailureKind.OUT_OF_MEMORY):
        raise _Malformed(f"oom is {json.dumps(out_of_memory)}, but failure is {failure}")
    if out_of_memory:
        return Failure(
            kind=FailureKind.OUT_OF_MEMORY,
            message="it was recorded so",
            phase=_text(line, "phase") if line.get("phase") is not None else "training",
            peak_memory_bytes=_bytes(line, "peak_gib") if line.get("peak_gib") is not None else None,
            wall_seconds=trial_s,
        )
    return None if failure is not None else _measurement(line, ranks, trial_s)


def _measurement(line: Mapping[str, Any], ranks: int, trial_s: float) -> Measurement:
    samples = _configuration(line).global_batch_size(ranks)
    step_s = _positive(line, "step_s")
    samples_per_s = _positive(line, "samples_per_s", MOST_SAMPLES_PER_SECOND)
    if not math.isclose(samples_per_s, samples / step_s, rel_tol=TOLERANCE):
        raise _Malformed(
            f"samples_per_s is {samples_per_s:g}, but {ranks} ranks × mbs × gas / step_s is {samples / step_s:g}"
        )
    steps = _seconds(line, "steps_s") or (step_s,)
    if not math.isclose(statistics.fmean(steps), step_s, rel_tol=TOLERANCE):
        raise _Malformed(f"step_s is {step_s:g}, but the mean of steps_s is {statistics.fmean(steps):g}")
    rate, (low, high) = throughput(steps, samples)
    # The recorded figure, of which the steps may be rounded.
    interval = low * samples_per_s / rate, high * samples_per_s / rate
    if line.get("samples_per_s_ci95") is not None:
        interval = _interval(line, "samples_per_s_ci95", samples_per_s)
    warmup = _seconds(line, "warmup_s")
    first_steps_s = math.fsum(warmup) - len(warmup) * step_s  # as long as every warm-up step was a whole one
    if line.get("first_steps_s") is not None:
        first_steps_s = _value(line, "first_steps_s", (int, float), "a number")
        if not -MOST_SECONDS <= first_steps_s <= MOST_SECONDS:
            raise _Malformed(f"first_steps_s is {shown(first_steps_s)}, more than {MOST_SECONDS:.0e} seconds")
    return Measurement(
        step_seconds=steps,
        samples_per_second=samples_per_s,
        samples_per_second_ci95=interval,
        forward_seconds=_optional(line, "forward_s"),
        backward_seconds=_optional(line, "backward_s"),
        optimizer_seconds=_optional(line, "optimizer_s"),
        deepspeed_samples_per_second=None,
        warmup_step_seconds=warmup,
        first_steps_seconds=first_steps_s,
        skipped_steps=0,
        peak_memory_bytes=_bytes(line, "peak_gib"),
        reserved_memory_bytes=_bytes(line, "reserved_gib"),
        alloc_retries=_integer(line, "alloc_retries", lowest=0) if line.get("alloc_retries") is not None else 0,
        setup_seconds=_optional(line, "setup_s"),
        wall_seconds=trial_s,
        model_parameters=0,
        flops_per_sample=0.0,
    )


def _document(text: str) -> Mapping[str, Any]:
    try:
        document = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        if "int_max_str_digits" in str(error):  # Python reads no integer of more than 4,300 digits
            raise _Malformed("a number in it has thousands of digits") from None
        raise _Malformed(f"it is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise _Malformed("it is no JSON object")
    return document


def _not_json(constant: str) -> float:
    """Python's reader would take NaN and Infinity for numbers."""
    raise ValueError(f"{constant} is no number")


def _value(line: Mapping[str, Any], key: str, kind: type | tuple[type, ...], words: str) -> Any:
    if key not in line:
        raise _Malformed(f"{key} is missing")
    value = line[key]
    # In Python true is an integer; in a recording it is a mistake.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _Malformed(f"{key} is {json.dumps(value)[:80]}, not {words}")
    return value


def _text(line: Mapping[str, Any], key: str) -> str:
    text: str = _value(line, key, str, "a text")
    if not text.strip():
        raise _Malformed(f"{key} is empty")
    _check_printable(key, text)
    return text


def _check_printable(key: str, text: str) -> None:
    """Half characters cannot be stored, and a terminal obeys control characters."""
    if not text.isprintable():
        raise _Malformed(f"{key} is {json.dumps(text)[:80]}, which has characters that cannot be printed")


def _integer(line: Mapping[str, Any], key: str, *, lowest: int, highest: int = LARGEST) -> int:
    words = f"a whole number from {lowest} to {highest}"
    value: int = _value(line, key, int, words)
    if not lowest <= value <= highest:
        raise _Malformed(f"{key} is {str(value)[:20]}, not {words}")
    return value


def _number(value: Any, key: str, *, zero: bool = False, highest: int = MOST_SECONDS) -> float:
    number: float = _value({key: value}, key, (int, float), "a number")
    if number < 0 or (number == 0 and not zero):
        raise _Malformed(f"{key} is {shown(value)}, not a number {'from 0 on' if zero else 'above 0'}")
    if not number <= highest:
        raise _Malformed(f"{key} is {str(value)[:20]}, not a number up to {highest}")
    return float(number)


def _positive(line: Mapping[str, Any], key: str, highest: int = MOST_SECONDS) -> float:
    if key not in line:
        raise _Malformed(f"{key} is missing")
    return _number(line[key], key, highest=highest)


def _bytes(line: Mapping[str, Any], key: str) -> int:
    """Bytes of a number of GiB."""
    count = round(_positive(line, key, LARGEST) * GIB)
    if count < 1:
        raise _Malformed(f"{key} is {line[key]}, less than a byte")
    return count


def _optional(line: Mapping[str, Any], key: str) -> float:
    """A number of seconds that need not have been recorded; 0 where it was not."""
    return _number(line[key], key, zero=True) if line.get(key) is not None else 0.0


def _interval(line: Mapping[str, Any], key: str, value: float) -> tuple[float, float]:
    """Two numbers with a value between them."""
    ends: Sequence[Any] = _value(line, key, list, "a list of two numbers")
    if len(ends) != 2:
        raise _Malformed(f"{key} has {len(ends)} numbers, not two")
    low, high = (
        _number(end, f"{key}[{index}]", zero=True, highest=MOST_SAMPLES_PER_SECOND) for index, end in enumerate(ends)
    )
    if not low <= value <= high:
        raise _Malformed(f"{key} is {low:g} to {high:g}, without the {value:g} between them")
    return low, high


def _seconds(line: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A list of seconds that need not have been recorded."""
    values: Sequence[Any] = _value(line, key, list, "a list of seconds") if line.get(key) is not None else ()
    return tuple(_number(value, f"{key}[{index}]") for index, value in enumerate(values))
