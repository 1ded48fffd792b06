"""A recorded surface is read as it was written, and a malformed line is refused with its number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.recorded.recording import KEYS, Recording, read_recording
from ds_tune.objectives.trial import KNOBS, Failure, FailureKind, Measurement, TrialConfig

HEADER: dict[str, Any] = {
    "hardware": "2xH200",
    "ranks": 2,
    "memory_cap_gib": 139.8,
    "model": "gpt2-xl",
    "seq_len": 1024,
    "dtype": "fp16",
    "versions": {"torch": "2.13.0"},
}
LINE: dict[str, Any] = {
    "stage": 1,
    "mbs": 4,
    "gas": 2,
    "ckpt": 0,
    "oom": False,
    "trial_s": 3.5,
    "step_s": 0.5,
    "samples_per_s": 32.0,
    "peak_gib": 20.0,
    "reserved_gib": 22.5,
}
OUT_OF_MEMORY: dict[str, Any] = {"stage": 0, "mbs": 64, "gas": 1, "ckpt": 0, "oom": True, "trial_s": 1.5}
CRASH: dict[str, Any] = {**OUT_OF_MEMORY, "oom": False, "failure": "crash", "message": "killed by SIGSEGV"}

Read = Callable[..., Recording]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes lines, dictionaries or texts, below a header and reads them."""

    def write_and_read(*lines: dict[str, Any] | str, header: dict[str, Any] | str = HEADER) -> Recording:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in (header, *lines)]
        path = tmp_path / "surface.jsonl"
        path.write_text("\n".join(texts) + "\n")
        return read_recording(path)

    return write_and_read


def only_outcome(surface: Recording) -> Any:
    [outcome] = surface.outcomes.values()
    return outcome


def test_the_header_is_the_machine_and_the_training(read: Read) -> None:
    surface = read(LINE)
    assert surface.machine.description == "2 × H200 (139.8 GiB)"
    assert surface.machine.capacity_bytes == round(139.8 * GIB)
    assert surface.machine.device_ids == (0, 1)
    assert surface.workload.description == "gpt2-xl fp16, sequence length 1024, synthetic tokens"
    assert surface.versions == {"torch": "2.13.0"}


def test_a_recording_on_a_cpu_names_no_gpus(read: Read) -> None:
    machine = read(LINE, header={**HEADER, "hardware": "2xCPU", "dtype": "fp32"}).machine
    assert (machine.device, machine.name, machine.ranks, machine.device_ids) == ("cpu", "CPU", 2, ())


def test_a_line_is_a_measurement_of_its_configuration(read: Read) -> None:
    surface = read(LINE)
    assert list(surface.outcomes) == [
        TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=2, activation_checkpointing=0)
    ]
    measured = only_outcome(surface)
    assert isinstance(measured, Measurement)
    assert (measured.step_seconds, measured.samples_per_second, measured.wall_seconds) == ((0.5,), 32.0, 3.5)
    assert (measured.peak_memory_bytes, measured.reserved_memory_bytes) == (20 * GIB, 22.5 * GIB)
    assert not measured.stopped_early


def test_optional_step_times_parts_and_retries_of_a_recorded_line_are_read(read: Read) -> None:
    steps = [0.48, 0.51, 0.5, 0.52, 0.49]
    parts = {"forward_s": 0.1, "backward_s": 0.2, "optimizer_s": 0.15, "alloc_retries": 3}
    measured = only_outcome(read({**LINE, "steps_s": steps, "warmup_s": [1.5], **parts}))
    assert measured.step_seconds == tuple(steps)
    assert measured.warmup_step_seconds == (1.5,)
    assert (measured.forward_seconds, measured.backward_seconds, measured.optimizer_seconds) == (0.1, 0.2, 0.15)
    assert measured.alloc_retries == 3
    low, high = measured.samples_per_second_ci95
    assert 30 < low < 32 < high < 34


def test_the_recorded_throughput_stands_where_the_steps_are_rounded(read: Read) -> None:
    measured = only_outcome(read({**LINE, "steps_s": [0.51, 0.51, 0.5]}))
    assert measured.samples_per_second == 32.0
    assert measured.samples_per_second_ci95[0] < 32.0 < measured.samples_per_second_ci95[1]


def test_out_of_memory_is_a_failure_with_what_was_recorded_of_it(read: Read) -> None:
    bare = only_outcome(read(OUT_OF_MEMORY))
    assert isinstance(bare, Failure)
    assert (bare.kind, bare.peak_memory_bytes, bare.wall_seconds) == (FailureKind.OUT_OF_MEMORY, None, 1.5)
    more = {"failure": "out_of_memory", "phase": "backward", "peak_gib": 139.5}
    full = only_outcome(read({**OUT_OF_MEMORY, **more}))
    assert (full.phase, full.peak_memory_bytes) == ("backward", round(139.5 * GIB))


def test_a_crash_is_left_out_and_counted(read: Read) -> None:
    surface = read(LINE, CRASH, {**CRASH, "mbs": 32, "failure": "timeout"})
    assert (len(surface.outcomes), surface.crashed) == (1, 2)


def test_first_line_counts_where_a_recording_repeats_a_configuration(read: Read) -> None:
    other = {**LINE, "samples_per_s": 16.0, "step_s": 1.0, "room": "warm"}
    surface = read({**LINE, "room": "cold"}, other, {**LINE, "ckpt": 1})
    assert (len(surface.outcomes), surface.repeated) == (2, 1)
    assert [outcome.samples_per_second for outcome in surface.outcomes.values()] == [32.0, 32.0]  # type: ignore[union-attr]


def test_a_knob_stands_under_its_fields_name_and_is_off_without(read: Read) -> None:
    surface = read(LINE, {**LINE, "compile": "blocks", "padded_vocabulary": 64})
    assert [config.knobs_on for config in surface.outcomes] == [{}, {"compile": "blocks", "padded_vocabulary": 64}]


def test_unknown_keys_and_empty_lines_change_nothing(read: Read) -> None:
    plain = read(LINE)
    more = read("", {**LINE, "note": "at night", "loss": None}, "  ", header={**HEADER, "room": 7})
    assert more.outcomes == plain.outcomes
    assert more.fingerprint == plain.fingerprint


def test_another_figure_is_another_recording(read: Read) -> None:
    assert read(LINE).fingerprint != read({**LINE, "peak_gib": 20.1}).fingerprint
    assert read(LINE).fingerprint != read(LINE, header={**HEADER, "memory_cap_gib": 24}).fingerprint


def test_every_knob_is_a_field_of_the_configuration() -> None:
    assert {key.field for key in KEYS.values()} | set(KNOBS) == set(TrialConfig.__dataclass_fields__)


MALFORMED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "cut off": ('{"stage": 1, "mbs":', "it is not JSON"),
    "no object": ("[1, 2]", "it is no JSON object"),
    "not a number": (json.dumps({**LINE, "step_s": float("nan")}), "it is not JSON (NaN is no number)"),
    "infinite": (json.dumps({**LINE, "trial_s": float("inf")}), "it is not JSON (Infinity is no number)"),
    "beyond floats": (json.dumps(LINE).replace("20.0", "1e999"), "peak_gib is inf, not a number up to 1048576"),
    "beyond integers": ({**LINE, "peak_gib": 10**400}, "peak_gib is 10000000000000000000, not a number up to 1048576"),
    "beyond any device": ({**LINE, "peak_gib": 1e300}, "peak_gib is 1e+300, not a number up to 1048576"),
    "below a byte": ({**LINE, "reserved_gib": 1e-300}, "reserved_gib is 1e-300, less than a byte"),
    "beyond any life": ({**LINE, "trial_s": 1e300}, "trial_s is 1e+300, not a number up to 1000000000"),
    "beyond any rate": ({**LINE, "samples_per_s": 1e300}, "samples_per_s is 1e+300, not a number up to 1000000000000"),
    "first steps beyond integers": ({**LINE, "first_steps_s": 10**400}, f"first_steps_s is 1{'0' * 59}…, more than"),
    "5,000 digits": (json.dumps(LINE).replace("20.0", "9" * 5000), "a number in it has thousands of digits"),
    "no such word of a knob": (
        {**LINE, "compile": "bananas"}, "compile is one of off, blocks, model, deepcompile, not 'bananas'",
    ),
    "no word for a knob": ({**LINE, "compile": 3}, "compile is one of off, blocks, model, deepcompile, not 3"),
    "no such number of a knob": ({**LINE, "bucket_elements": -5}, "bucket_elements is 0 for off, or more, not -5"),
    "no number for a knob": ({**LINE, "bucket_elements": "5"}, "bucket_elements takes whole numbers, not '5'"),
    "a knob beyond integers": ({**LINE, "bucket_elements": 10**30}, "bucket_elements takes whole numbers below 2^63"),
    "an unknown failure": (
        {**CRASH, "failure": "bad luck"}, "failure is 'bad luck', none of out_of_memory, invalid_config, timeout",
    ),
    "half a character of a phase": (
        {**OUT_OF_MEMORY, "phase": "\ud800"}, 'phase is "\\ud800", which has characters that cannot be printed',
    ),
    **{
        f"no {key}": ({name: value for name, value in LINE.items() if name != key}, f"{key} is missing") for key in LINE
    },
    "text for a number": ({**LINE, "step_s": "0.5"}, 'step_s is "0.5", not a number'),
    "list of steps for their mean": ({**LINE, "step_s": [0.5]}, "step_s is [0.5], not a number"),
    "truth for a number": ({**LINE, "mbs": True}, "mbs is true, not a whole number from 1 to 1048576"),
    "number for truth": ({**LINE, "oom": 0}, "oom is 0, not true or false"),
    "half a sample": ({**LINE, "mbs": 4.0}, "mbs is 4.0, not a whole number"),
    "no sample": ({**LINE, "mbs": 0}, "mbs is 0, not a whole number from 1 to 1048576"),
    "too many": ({**LINE, "gas": 10**30}, "gas is 10000000000000000000, not a whole number from 1 to 1048576"),
    "no such stage": ({**LINE, "stage": 4}, "stage is 4, not a whole number from 0 to 3"),
    "no time": ({**LINE, "step_s": 0}, "step_s is 0, not a number above 0"),
    "time backwards": ({**LINE, "trial_s": -1.5}, "trial_s is -1.5, not a number above 0"),
    "null": ({**LINE, "samples_per_s": None}, "samples_per_s is null, not a number"),
    "steps that are one number": ({**LINE, "steps_s": 0.5}, "steps_s is 0.5, not a list of seconds"),
    "a step of no time": ({**LINE, "steps_s": [0.5, 0]}, "steps_s[1] is 0, not a number above 0"),
    "other steps": ({**LINE, "steps_s": [1.0, 1.1]}, "step_s is 0.5, but the mean of steps_s is 1.05"),
    "other ranks": ({**LINE, "samples_per_s": 64.0}, "samples_per_s is 64, but 2 ranks × mbs × gas / step_s is 32"),
    "fits and does not": ({**LINE, "failure": "out_of_memory"}, "oom is false, but failure is out_of_memory"),
    "does not fit and crashed": ({**OUT_OF_MEMORY, "failure": "crash"}, "oom is true, but failure is crash"),
    "negative parts": ({**LINE, "forward_s": -0.1}, "forward_s is -0.1, not a number from 0 on"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_refused_with_its_number(read: Read, tmp_path: Path, case: str) -> None:
    line, wrong = MALFORMED[case]
    with pytest.raises(UsageError) as refused:
        read(LINE, "", line, LINE)
    assert str(refused.value).startswith(f"`replay={tmp_path}/surface.jsonl`, line 4: {wrong}")
    assert str(refused.value).endswith("; docs/surfaces.md has the format")
    assert "\n" not in str(refused.value)


HEADERS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "empty": ("", "the file is empty"),
    "no header": (LINE, "hardware is missing"),
    **{
        f"no {key}": ({name: value for name, value in HEADER.items() if name != key}, f"{key} is missing")
        for key in HEADER
        if key != "versions"
    },
    "other ranks": ({**HEADER, "ranks": 4}, "hardware is 2xH200, but ranks is 4"),
    "no count": ({**HEADER, "hardware": "H200"}, "hardware is 'H200', not of the form 2xH200 or 2xCPU"),
    "no ranks": ({**HEADER, "ranks": 0}, "ranks is 0, not a whole number"),
    "no memory": ({**HEADER, "memory_cap_gib": 0}, "memory_cap_gib is 0, not a number above 0"),
    "unknown precision": ({**HEADER, "dtype": "fp8"}, "dtype 'fp8' is none of fp16, bf16, fp32"),
    "no model": ({**HEADER, "model": ""}, "model is empty"),
    "versions": ({**HEADER, "versions": ["2.13"]}, "versions is not an object of texts"),
    "half a character of a model": ({**HEADER, "model": "\ud800"}, 'model is "\\ud800", which has characters that'),
    "half a character of a version": (
        {**HEADER, "versions": {"torch": "\ud800"}}, 'versions is "\\ud800", which has characters that cannot be',
    ),
    "a colour": ({**HEADER, "model": "\x1b[31mred"}, 'model is "\\u001b[31mred", which has characters that cannot be'),
    "beyond any device": ({**HEADER, "memory_cap_gib": 1e300}, "memory_cap_gib is 1e+300, not a number up to 1048576"),
    "below a byte": ({**HEADER, "memory_cap_gib": 1e-300}, "memory_cap_gib is 1e-300, less than a byte"),
    "5,000 digits": ({**HEADER, "hardware": f"{'9' * 5000}xH200"}, f"hardware is '{'9' * 59}…, not of the form"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_line_1(read: Read, case: str) -> None:
    header, wrong = HEADERS[case]
    with pytest.raises(UsageError) as refused:
        read(header=header) if header == "" else read(LINE, header=header)
    assert f", line 1: {wrong}" in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_recording_of_nothing_that_ran_is_refused(read: Read) -> None:
    for lines in ([], [CRASH]):
        with pytest.raises(UsageError, match="has no configuration to replay"):
            read(*lines)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_recording(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recording(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not text"):
        read_recording(tmp_path / "binary")
