"""Requests: the defaults of the options, what is refused, and how the command line spells fields."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.tuner.arguments import (
    in_options,
    not_negative,
    plan_parser,
    plan_request,
    positive,
    tune_parser,
    tune_request,
    whole,
)
from ds_tune.tuner.request import PlanRequest, TuneRequest, as_fields, request_of

OUTPUT = {"json", "quiet", "help"}
"""Options that ask nothing of a study, but of how it is shown."""


def test_a_command_without_options_is_the_request_without_fields() -> None:
    assert tune_request(tune_parser().parse_args([])) == TuneRequest()
    assert plan_request(plan_parser().parse_args([])) == PlanRequest()


def test_every_option_is_a_field_and_every_field_of_a_study_an_option() -> None:
    # A script's launch line comes behind --, and an explanation is no study.
    fields = {field.name for field in dataclasses.fields(TuneRequest)} - {"script"} | {"explain"}
    assert {action.dest for action in tune_parser()._actions} - OUTPUT == fields
    assert {action.dest for action in plan_parser()._actions} - OUTPUT - {"details"} <= {
        field.name for field in dataclasses.fields(PlanRequest)
    }


def test_options_become_fields_with_their_types() -> None:
    words = ["--trials", "3", "--no-verify", "--allow", "numerics:dropout", "--ds-config", "ds.json", "--gpus", "0"]
    assert tune_request(tune_parser().parse_args(words)) == TuneRequest(
        trials=3, verify=False, allow=("numerics:dropout",), ds_config=Path("ds.json"), gpus=0
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"trials": 0}, "`trials` must be at least 1 (got 0)"),
        ({"trials": "9"}, "`trials` must be a whole number (got '9')"),
        ({"trials": True}, "`trials` must be a whole number (got True)"),
        ({"trials": 10**20}, f"`trials` must be at most 1000000 (got {10**20})"),
        ({"more": 1_000_001}, "`more` must be at most 1000000 (got 1000001)"),
        ({"seed": -1}, "`seed` must be at least 0 (got -1)"),
        ({"gpus": -1}, "`gpus=-1`: a number of GPUs, or 0 for the CPU"),
        ({"trial_timeout": 0}, "`trial_timeout` must be a number of seconds from above 0 to 1000000000"),
        ({"trial_timeout": float("inf")}, "`trial_timeout` must be a number of seconds from above 0 to"),
        ({"ranks": 1025}, "`ranks` must be at most 1024 (got 1025)"),
        ({"trial_timeout": float("nan")}, "`trial_timeout` must be a number of seconds from above 0 to"),
        ({"seed": 10**5000}, "`seed` must be less than 2^63 (got a number of thousands of digits)"),
        ({"gpus": -(10**5000)}, "`gpus=a number of thousands of digits`: a number of GPUs, or 0 for the CPU"),
        ({"sampler": "best"}, "`sampler=best` is none of cost-model, tpe, gp, random, grid"),
        ({"preset": "all"}, "`preset=all` is none of core, speed, full"),
        ({"dtype": "fp8"}, "`dtype=fp8` is none of fp16, bf16, fp32"),
        ({"allow": ("dropout",)}, "`allow=dropout`: what can be allowed is numerics:"),
        ({"memory_cap": 24}, "`memory_cap=24`: write a size such as 24GiB or 512MiB"),
        ({"memory_cap": 10**5000}, "`memory_cap=a number of thousands of digits`: write a size such as"),
        ({"memory_cap": "9" * 5000}, f"`memory_cap='{'9' * 59}…`: write a size such as"),
        ({"dtype": "9" * 5000}, f"`dtype='{'9' * 59}…` is none of"),
        ({"memory_cap": "lots"}, "`memory_cap=lots`: write a size such as 24GiB or 512MiB"),
        ({"global_batch": 8, "max_global_batch": 8}, "`global_batch` does not go with `max_global_batch`"),
        ({"hardware": "2xH100"}, "`hardware` imagines GPUs; add `simulate` to search on them"),
        ({"simulate": True}, "`simulate` needs to know on what: add `hardware`"),
        ({"replay": Path("r"), "gpus": 0, "fresh_ranks": True}, "`replay` does not go with `gpus`, `fresh_ranks`: "),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_is_refused_in_the_words_of_its_fields(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        TuneRequest(**fields)
    assert str(refused.value).startswith(sentence)


WRONG: dict[str, tuple[Any, str]] = {
    "a text": (7, "must be a text (got 7)"),
    "a text that is empty": (" ", "is empty; give it a value, or leave it out"),
    "a text of half a character": ("\ud800", "has characters that cannot be printed (got '\\ud800')"),
    "a whole number": ("0", "must be a whole number (got '0')"),
    "a number": ("0", "must be a number (got '0')"),
    "True or False": ("no", "must be True or False (got 'no')"),
    "a path": ({}, "must be a path (got {})"),
    "a path that is empty": ("", "is empty; give it a value, or leave it out"),
    "a list of texts": ({"numerics": "dropout"}, "must be a list of texts (got {'numerics': 'dropout'})"),
}
"""By what a field should be: a value that is none, and how it is refused."""


WORDS = {
    "<class 'str'>": "a text", "str": "a text", "<class 'int'>": "a whole number", "int": "a whole number",
    "float": "a number", "<class 'bool'>": "True or False", "bool": "True or False",
    "<class 'pathlib.Path'>": "a path", "pathlib.Path": "a path", "tuple[str, ...]": "a list of texts",
}  # fmt: skip
"""By a field's declared type."""


@pytest.mark.parametrize("field", dataclasses.fields(TuneRequest), ids=lambda field: field.name)
def test_a_field_of_another_type_is_refused_by_name(field: dataclasses.Field[Any]) -> None:
    if field.name == "memory_cap":  # a size has a sentence of its own
        return
    kind = WORDS[str(field.type).removesuffix(" | None")]
    for wanted, (value, refusal) in WRONG.items():
        if wanted.startswith(kind):
            with pytest.raises(UsageError) as refused:
                request_of({field.name: value})
            assert str(refused.value) == f"`{field.name}` {refusal}"
    if "None" not in str(field.type):
        with pytest.raises(UsageError, match=rf"^`{field.name}` must be .* \(got None\)$"):
            request_of({field.name: None})


@pytest.mark.parametrize(
    "option",
    [action.option_strings[0] for action in tune_parser()._actions if action.type in (positive, not_negative, whole)],
)
def test_an_integer_option_says_in_a_short_sentence_what_is_wrong(option: str) -> None:
    for value, why in (
        ("9" * 5000, "a number of 5000 characters is too large"), ("x" * 5000, f"'{'x' * 59}… is not a whole number"),
        ("1.5", "1.5 is not a whole number"), ("9" * 24, None),
    ):  # fmt: skip
        with pytest.raises(UsageError) as refused:
            tune_request(tune_parser().parse_args([option, value]))
        assert len(str(refused.value)) < 200
        assert why is None or f"argument {option}: {why}" in str(refused.value)


def test_a_field_that_is_none_is_refused_with_the_nearest() -> None:
    for wrong, near in (("modell", "model"), ("no_verify", "verify"), ("trails", "trials")):
        with pytest.raises(UsageError) as refused:
            request_of({wrong: True})
        assert str(refused.value) == f"there is no field `{wrong}`; is `{near}` meant?"
    with pytest.raises(UsageError, match="there is no field `zzz`; there are model, dtype, "):
        request_of({"zzz": 1})


def test_more_trials_and_a_total_do_not_go_together() -> None:
    with pytest.raises(UsageError, match=r"^`trials` does not go with `more`; leave out one$"):
        request_of({"trials": 9, "more": 2})


def test_paths_may_be_text_and_names_paths() -> None:
    fields = as_fields({"results": "out", "replay": None, "model": Path("folder"), "allow": "numerics:dropout"})
    assert fields == {"results": Path("out"), "replay": None, "model": "folder", "allow": ("numerics:dropout",)}


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("`seq_len` must be at least 2 (got 1)", "--seq-len must be at least 2 (got 1)"),
        ("`gpus=0` runs on the CPU", "--gpus 0 runs on the CPU"),
        ("`allow=numerics:dropout`", "--allow numerics:dropout"),
        ("or `study=NAME` `results=DIR`", "or --study NAME --results DIR"),
        ("`results=a folder/b` holds", "--results a folder/b holds"),
        ("`out=there` and `port=80`", "--out there and --port 80"),
        ("add `verify=False`, `simulate=True`", "add --no-verify, --simulate"),
        ("``model`` and `numpy` and `help`", "`--model` and `numpy` and `help`"),
        ("nothing --of it", "nothing --of it"),
    ],
)
def test_the_command_line_spells_fields_as_its_options(text: str, spelled: str) -> None:
    assert in_options(text) == spelled
