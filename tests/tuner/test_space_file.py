"""`--space FILE`: a search space in the user's own words."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.loss_scale import STAGE_0_LEFT_OUT
from ds_tune.objectives.trial import TrialConfig
from ds_tune.tuner.cli import main
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.space import COARSE_MICRO_BATCHES, Space
from ds_tune.tuner.space_file import SpaceFile

Tune: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]
Write: TypeAlias = Callable[..., Path]

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "knobs.md"
LIMITS = Limits(ranks=2, max_micro_batch=64, max_global_batch=256)
SITE = KnobContext(ranks=2, vocabulary=50257)
SMALL = Limits(ranks=2, max_micro_batch=4, max_global_batch=8)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(text: str, name: str = "space.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to


def configurations(
    path: Path, limits: Limits = LIMITS, *allowed: str, context: KnobContext = SITE
) -> tuple[TrialConfig, ...]:
    return SpaceFile.read(path).configurations(limits, context, allowed)


def test_the_documented_example_is_a_space(write: Write) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    found = configurations(write(example))
    assert len({config.name for config in found}) == len(found)
    assert {config.zero_stage for config in found} == {1, 2, 3}
    assert {config.micro_batch_size for config in found} == {4, 8, 12, 16, 20, 24, 28, 32}
    assert {config.gradient_accumulation_steps for config in found} == {1, 2, 4, 8, 16}
    assert {config.compile for config in found if config.zero_stage == 3} == {"off"}
    assert {config.compile for config in found if config.zero_stage < 3} == {"off", "blocks"}
    assert all(config.activation_checkpointing == 1 for config in found)
    assert all(config.micro_batch_size * config.gradient_accumulation_steps <= 64 for config in found)


def test_toml_and_yaml_say_the_same(write: Write) -> None:
    toml = write(
        'constraints = ["micro_batch_size > 1"]\n[search]\nzero_stage = [0, 1]\noverlap_comm = ["on", "off"]\n'
        "[fixed]\nmicro_batch_size = 2\n"
    )
    # YAML 1.1 reads the bare words on and off as true and false.
    yaml = write(
        "constraints: [micro_batch_size > 1]\nsearch:\n  zero_stage: [0, 1]\n  overlap_comm: [on, off]\n"
        "fixed:\n  micro_batch_size: 2\n",
        "space.yaml",
    )
    assert configurations(toml) == configurations(yaml)
    assert {config.overlap_comm for config in configurations(yaml)} == {"default", "on", "off"}


def test_field_not_listed_in_a_space_file_is_as_in_the_preset(write: Write) -> None:
    plain = configurations(write("[fixed]\nzero_stage = 1\n"))
    assert {config.micro_batch_size for config in plain} == {size for size in COARSE_MICRO_BATCHES if size <= 64}
    assert all(config.knobs_on == {} for config in plain)
    fast = configurations(write('preset = "speed"\n[fixed]\nzero_stage = 1\n'))
    assert {config.compile for config in fast} == {"off", "blocks"}
    assert {config.padded_vocabulary for config in fast} == {0, 64}


def test_a_knob_is_off_where_it_has_no_meaning(write: Write) -> None:
    found = configurations(write('[fixed]\noverlap_comm = "on"\nmicro_batch_size = 1\n'))
    assert {config.overlap_comm for config in found if config.zero_stage == 0} == {"default"}
    assert {config.overlap_comm for config in found if config.zero_stage > 0} == {"on"}
    assert len({config.name for config in found}) == len(found)


def test_a_whole_number_knob_takes_values_of_ones_own(write: Write) -> None:
    found = configurations(write("[search]\nbucket_elements = [0, 12345678]\n[fixed]\nzero_stage = 2\n"))
    assert {config.bucket_elements for config in found} == {0, 12345678}


def test_with_a_fixed_global_batch_gas_follows(write: Write) -> None:
    limits = Limits(ranks=2, max_micro_batch=64, max_global_batch=256, global_batch=48)
    found = configurations(write("[search]\nmicro_batch_size = {min = 1, max = 8}\n"), limits)
    assert {(config.micro_batch_size, config.gradient_accumulation_steps) for config in found} == {
        (1, 24), (2, 12), (3, 8), (4, 6), (6, 4), (8, 3),
    }  # fmt: skip


def test_dropout_in_a_space_file_is_refused_unless_its_change_of_numerics_is_allowed(write: Write) -> None:
    path = write('[search]\ndropout = ["model", "none"]\n')
    with pytest.raises(UsageError, match="dropout changes the numbers of training: add `allow=numerics:dropout`"):
        configurations(path)
    assert {config.dropout for config in configurations(path, LIMITS, "dropout")} == {"model", "none"}


def test_every_configuration_is_one_that_optuna_can_hold(write: Write) -> None:
    path = write('[search]\ncompile = ["off", "blocks"]\nmicro_batch_size = [1, 2, 4]\nbucket_elements = [0, 7]\n')
    space = Space(SMALL, restricted_to=configurations(path, SMALL))
    assert set(space.distributions) == {
        "zero_stage", "micro_batch_size", "gradient_accumulation_steps", "compile", "bucket_elements",
    }  # fmt: skip
    for config in space.legal:
        for name, value in space.params(config).items():
            assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value))


REFUSED = {
    "nothing": ("", "it says nothing; list fields under search or fixed"),
    "not TOML": ("[search\n", "not TOML: "),
    "a word beside the tables": ("serach = 1\n", "there is no serach; is search meant?"),
    "no table": ("search = 3\n", "search is a table of fields"),
    "an unknown field": ("[search]\nmicro_batch = [1]\n", "is micro_batch_size meant?"),
    "a field twice": ("[search]\nzero_stage = [1]\n[fixed]\nzero_stage = 1\n", "is under search and under fixed"),
    "one value to search": ("[search]\nzero_stage = 1\n", "one value belongs under fixed"),
    "an empty list": ("[search]\nzero_stage = []\n", "search.zero_stage is empty"),
    "a stage that is none": ("[search]\nzero_stage = [4]\n", "zero_stage is 0, 1, 2 or 3, not 4"),
    "no samples": ("[fixed]\nmicro_batch_size = 0\n", "micro_batch_size is at least 1, not 0"),
    "half a sample": ("[fixed]\nmicro_batch_size = 1.5\n", "micro_batch_size takes whole numbers, not 1.5"),
    "true samples": ("[fixed]\nmicro_batch_size = true\n", "micro_batch_size takes whole numbers, not True"),
    "a number in words": ("[fixed]\nmicro_batch_size = '4'\n", "micro_batch_size takes whole numbers, not '4'"),
    "a value there is not": ("[fixed]\ncompile = 'blokcs'\n", "compile is one of off, blocks, model"),
    "a negative bucket": ("[fixed]\nbucket_elements = -1\n", "bucket_elements is 0 for off, or more, not -1"),
    "a range of words": ("[search]\ncompile = {min = 1, max = 2}\n", "search.compile has no range"),
    "half a range": ("[search]\nmicro_batch_size = {min = 1}\n", "as a range has min, max and perhaps a step"),
    "a range with a typo": ("[search]\nmicro_batch_size = {min = 1, max = 2, stp = 1}\n", "as a range has min, max"),
    "a range backwards": ("[search]\nmicro_batch_size = {min = 8, max = 4}\n", "min 8 is more than max 4"),
    "a range without steps": ("[search]\nmicro_batch_size = {min = 1, max = 4, step = 0}\n", "a step is at least 1"),
    "a range that does not grow": (
        "[search]\nmicro_batch_size = {min = 1, max = 4, factor = 1}\n", "a factor is at least 2, from a min of at",
    ),
    "an endless range": ("[search]\nmicro_batch_size = {min = 1, max = 999999999}\n", "give it a larger step"),
    "a preset there is not": ("preset = 'full'\n", "preset is core or speed, not 'full'"),
    "constraints that are no list": ("constraints = 'zero_stage > 1'\n", "constraints is a list of conditions"),
    "a constraint that is code": ("constraints = ['exit() == 1']\n", "constraints: 'exit() == 1': there is no exit"),
    "a constraint that compares unlike things": ("constraints = ['compile < 3']\n", "constraints: 'compile < 3': "),
    "constraints that nothing meets": (
        "constraints = ['zero_stage > 3']\n", "within the limits of the batch sizes keeps to its constraints",
    ),
    "a constraint without an end": (f"constraints = ['{'not ' * 2000}ranks == 1']\n", "is nested too deeply"),
    "sizes beyond a limit": (
        "[fixed]\nmicro_batch_size = 100\n",
        "its smallest batch, micro_batch_size 100 and gradient_accumulation_steps 1 on 2 ranks, is beyond the limits; "
        "list smaller values, or add `max_micro_batch=100`",
    ),
    "sizes beyond the limits": (
        "[search]\nmicro_batch_size = [1000]\n", "or add `max_micro_batch=1000` `max_global_batch=2000`",
    ),
    "sums beyond the limits": (
        "[fixed]\nmicro_batch_size = 8\ngradient_accumulation_steps = 32\n", "or add `max_global_batch=512`",
    ),
    "a number of 400 digits": (
        f"[fixed]\nmicro_batch_size = 1{'0' * 400}\n", "micro_batch_size takes whole numbers below 2^63",
    ),
    "a range to 400 digits": (
        f"[search]\nmicro_batch_size = {{min = 1, max = 1{'0' * 400}, factor = 2}}\n",
        "search.micro_batch_size.max takes whole numbers below 2^63",
    ),
    "a number of 5000 digits": (
        f"[fixed]\nmicro_batch_size = 1{'0' * 5000}\n", "not TOML: a number in it has thousands of digits",
    ),
    "tables in tables": (f"[fixed]\ncompile = {'[' * 5000}", "not TOML for a space: it is nested too deeply"),
    "a word of two lines": ("[fixed]\ncompile = 'off\\n'\n".replace("'", '"'), "compile is one of off, blocks"),
    "a knob without a meaning": (
        "[fixed]\nzero_stage = 0\noverlap_comm = 'on'\n", "overlap_comm has no meaning in any configuration left",
    ),
    "too many": (
        "[search]\nbucket_elements = {min = 1, max = 50000}\nprefetch_elements = {min = 1, max = 50000}\n",
        "more than 100000 configurations",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "why"), REFUSED.values(), ids=REFUSED)
def test_invalid_space_file_is_refused_in_one_sentence_with_its_name(write: Write, text: str, why: str) -> None:
    path = write(text)
    with pytest.raises(UsageError) as refused:
        configurations(path)
    assert why in str(refused.value)
    assert str(refused.value).startswith(f"`space={path}`: ")
    assert len(str(refused.value).splitlines()) == 1


REFUSED_YAML = {
    "a key that is no word": ("1: 2\n", "there is no 1; there are preset, search, fixed, constraints"),
    "a field that is no word": ("search: {1: [2]}\n", "search: there is no 1; there are "),
    "a date that is none": ("search:\n  micro_batch_size: [2024-13-45]\n", "not YAML: month must be in 1..12"),
    "a date": ("search:\n  micro_batch_size: [2024-12-24]\n", "takes whole numbers, not datetime.date(2024, 12, 24)"),
    "no time at all": ("preset: !!timestamp core\n", "not YAML: "),
    "lists in lists": ("preset: " + "[" * 5000, "not YAML for a space: it is nested too deeply"),
    "characters of no text": ("preset: \x00\x01\n", "it is not a text file"),
    "a word of two lines": ('fixed: {compile: "off\\n"}\n', "compile is one of off, blocks"),
}


@pytest.mark.parametrize(("text", "why"), REFUSED_YAML.values(), ids=REFUSED_YAML)
def test_invalid_yaml_space_file_is_refused_in_one_sentence_with_its_name(write: Write, text: str, why: str) -> None:
    path = write(text, "space.yaml")
    with pytest.raises(UsageError) as refused:
        configurations(path)
    assert why in str(refused.value)
    assert str(refused.value).startswith(f"`space={path}`: ")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "micro_batch_size = [5, 7]",
            "no micro_batch_size × gradient_accumulation_steps of it makes `global_batch=48` on 2",
        ),
        (
            "micro_batch_size = [12, 24]",
            "takes a micro_batch_size of 12 or more of it, and `max_micro_batch` is 8; list",
        ),
    ],
)
def test_a_global_batch_that_its_sizes_cannot_make_is_named(write: Write, text: str, why: str) -> None:
    limits = Limits(ranks=2, max_micro_batch=8, max_global_batch=256, global_batch=48)
    with pytest.raises(UsageError) as refused:
        configurations(write(f"[search]\n{text}\n"), limits)
    assert why in str(refused.value)


@pytest.mark.parametrize("table", ["[fixed]\nzero_stage = 0\n", "[search]\nzero_stage = [1, 0]\n"])
def test_stage_0_is_refused_with_its_reason_where_its_gradients_are_lost(write: Write, table: str) -> None:
    path = write(table)
    assert {config.zero_stage for config in configurations(path)} >= {0}
    with pytest.raises(UsageError) as refused:
        configurations(path, context=dataclasses.replace(SITE, stage_0_trains=False))
    assert str(refused.value) == (
        f"`space={path}`: {STAGE_0_LEFT_OUT.removesuffix('.')}; list zero_stage 1, 2 or 3, or train in bf16 "
        "(`dtype=bf16`) where the GPUs have it"
    )


def test_files_that_are_none_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        SpaceFile.read(tmp_path / "nonesuch.toml")
    with pytest.raises(UsageError, match=r"name it \.toml, \.yaml or \.yml"):
        SpaceFile.read(write("{}", "space.json"))
    with pytest.raises(UsageError, match=r"not YAML: .* at line 3"):
        SpaceFile.read(write("search:\n  zero_stage: [1\nfixed: 3: 4\n", "space.yml").rename(tmp_path / "b.yml"))
    with pytest.raises(UsageError, match="it says nothing"):
        SpaceFile.read(write("- 1\n", "list.yaml"))
    (tmp_path / "image.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        SpaceFile.read(tmp_path / "image.toml")


STAGES_1_AND_2 = "[search]\nzero_stage = [1, 2]\nmicro_batch_size = [1, 2]\ngradient_accumulation_steps = [1, 2]\n"
HERE = ["--gpus", "0", "--seq-len", "32", "--max-global-batch", "8", "--sampler", "tpe"]


def test_a_study_tries_nothing_else_and_begins_with_the_smallest(tune: Tune, write: Write) -> None:
    write(STAGES_1_AND_2)
    done = tune("--trials", "20", "--space", "space.toml", "--json", *HERE, space=[])
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ended"] == "every configuration of the space has been tried"
    assert document["baseline"]["name"] == document["trials"][0]["name"] == "z1_gas1_tmbspg1"
    assert {trial["name"] for trial in document["trials"]} == {
        f"z{stage}_gas{gas}_tmbspg{mbs}" for stage in (1, 2) for gas in (1, 2) for mbs in (1, 2)
    }


def test_a_study_goes_on_with_the_same_configurations_only(tune: Tune, write: Write, tmp_path: Path) -> None:
    write(STAGES_1_AND_2)
    command = ["--trials", "3", *HERE]
    assert tune(*command, "--space", "space.toml", space=[]).returncode == 0
    shutil.copy(tmp_path / "space.toml", tmp_path / "moved.toml")
    assert tune(*command, "--space", "moved.toml", space=[]).returncode == 0
    write(STAGES_1_AND_2.replace("gradient_accumulation_steps = [1, 2]", "gradient_accumulation_steps = [1]"))
    refused = tune(*command, "--space", "space.toml", space=[])
    assert refused.returncode == 2
    assert "study ds-tune measured something else (space" in refused.stderr
    assert "only 8 configurations" in refused.stderr and "4 configurations" in refused.stderr
    again = tune(*command, "--space", "moved.toml", space=[])
    assert again.returncode == 0 and "is finished (3 trials)" in again.stdout


@pytest.mark.parametrize("sampler", ["cost-model", "tpe", "gp", "random", "grid"])
def test_every_sampler_searches_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sampler: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write('[search]\nzero_stage = [1, 2]\ncompile = ["off", "blocks"]\n')
    simulate = ["--simulate", "--hardware", "2xH100", "--model", "gpt2", "--space", "space.toml"]
    assert main([*simulate, "--trials", "4", "--sampler", sampler, "--json"]) == 0
    configs = [trial["config"] for trial in json.loads(capsys.readouterr().out)["trials"]]
    assert configs and {config["zero_stage"] for config in configs} <= {1, 2}


def test_a_plan_shows_it(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write('[fixed]\nzero_stage = 2\ncompile = "blocks"\nmicro_batch_size = 4\n')
    assert main(["plan", "--hardware", "2xH100", "--model", "gpt2", "--space", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["fitting"]
    assert rows and all(row["name"].startswith("z2_compile-blocks") for row in rows)


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (["--preset", "speed"], "--space does not go with --preset: the file can name one itself"),
        (["--replay", "surface.jsonl"], "--space does not go with --replay"),
    ],
)
def test_two_spaces_at_once_are_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    others: list[str], why: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recorded = Path(__file__).parents[2] / "benchmarks" / "data" / "1xH200.gpt2-xl.jsonl"
    shutil.copy(recorded, tmp_path / "surface.jsonl")
    write(STAGES_1_AND_2)
    hardware = [] if "--replay" in others else ["--simulate", "--hardware", "2xH100"]
    assert main(["--space", "space.toml", *hardware, *others]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "autotuning_results").exists()


@pytest.mark.parametrize("name", ["space.toml", "space.yaml"])
def test_numbers_may_be_written_as_deepspeed_files_have_them(write: Write, name: str) -> None:
    text = {
        "space.toml": "constraints = ['bucket_elements <= 5e8']\n[search]\nbucket_elements = [5e8, 2e8]\n"
        "micro_batch_size = [4.0]\n",
        "space.yaml": "constraints: ['bucket_elements <= 5e8']\nsearch:\n  bucket_elements: [5e8, 2e8]\n"
        "  micro_batch_size: [4.0]\n",
    }[name]
    found = configurations(write(text, name))
    assert {config.bucket_elements for config in found if config.zero_stage} == {500_000_000, 200_000_000}
    assert {config.micro_batch_size for config in found} == {4}
    assert all(isinstance(config.micro_batch_size, int) for config in found)
