"""Messages between the tuner and its ranks come back from their lines as they were."""

import dataclasses
import json
from pathlib import Path

import pytest

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.running.protocol import (
    Command,
    Event,
    Failed,
    Finished,
    Losses,
    Notice,
    Phase,
    RankContext,
    RankResult,
    Ready,
    Refused,
    Released,
    Setup,
    Time,
    decode_command,
    decode_event,
    encode,
)
from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.timing.step_plan import PRECISE
from ds_tune.objectives.trial import Failure, FailureKind, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

CONFIG = TrialConfig(zero_stage=3, micro_batch_size=2, gradient_accumulation_steps=4, compile="deepcompile")


def commands(workload: HuggingFaceWorkload, machine: Machine) -> list[Command]:
    return [
        Setup(context=RankContext(workload=workload, machine=machine, optimizers=(CONFIG,))),
        Time(
            config=CONFIG,
            log_folder=Path("/results/z3"),
            plan=PRECISE,
            seconds_per_sample=0.1,
            best_samples_per_second=None,
        ),
        Losses(config=CONFIG, log_folder=Path("/results/z3"), steps=20, seconds_per_sample=None),
    ]


def events(result: RankResult) -> list[Event]:
    parts = StepParts.of([[3.0, 1.0, 1.1, 0.9, 4.0]], 64)
    failure = Failure(kind=FailureKind.OUT_OF_MEMORY, message="rank 1 in forward: gone", phase="forward", rank=1)
    return [
        Ready(),
        Refused(message="no such model", usage=True),
        Phase(phase="engine", seconds=60.0),
        Phase(phase="start"),
        Notice(text="compiling FusedAdam", seconds=120.0),
        Finished(result=result),
        Finished(result=dataclasses.replace(result, from_parts=parts)),
        Finished(result=LossCurve(losses=(2.0, 1.5), skipped_steps=1)),
        Failed(failure=failure),
        Released(left_bytes={"device": 0, "host": 4096}, collectives=(7, 9)),
    ]


def test_commands_survive_their_line(workload: HuggingFaceWorkload, machine: Machine) -> None:
    for command in commands(workload, machine):
        line = encode(command)
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        assert decode_command(line) == command


def test_events_survive_their_line(rank_result: RankResult) -> None:
    for event in events(rank_result):
        line = encode(event)
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        assert decode_event(line) == event


def test_every_message_is_plain_json_with_its_name(
    workload: HuggingFaceWorkload, machine: Machine, rank_result: RankResult
) -> None:
    names = [json.loads(encode(command))["command"] for command in commands(workload, machine)]
    assert names == ["setup", "time", "losses"]
    assert {json.loads(encode(event))["event"] for event in events(rank_result)} == {
        "ready", "refused", "phase", "notice", "finished", "failed", "released",
    }  # fmt: skip


def test_an_event_is_no_command(rank_result: RankResult) -> None:
    with pytest.raises(KeyError):
        decode_command(encode(Finished(result=rank_result)))
