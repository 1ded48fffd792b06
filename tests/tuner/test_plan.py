"""`tune plan`: what would fit and how fast, predicted for hardware that need not be here; nothing is run or written."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.cost_model.hardware import CATALOGUE
from ds_tune.objectives.cost_model.memory import MemoryEstimate
from ds_tune.objectives.machine import GIB
from ds_tune.tuner.cli import main
from ds_tune.tuner.space import BATCH_FIELDS

Row = dict[str, Any]
Plan = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]
LLAMA_8B = str(Path(__file__).parent / "models" / "llama-8b.json")
ALL = ["--best", "100000"]
SMALLEST = {f"z{stage}_gas1_tmbspg1" for stage in range(4)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `tune plan` on a wide terminal; the status, the output and the errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["plan", *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def document(plan: Run) -> Callable[..., Plan]:
    """The plan as its JSON document."""

    def run(*arguments: str, status: int = 0) -> Plan:
        returned, output, error = plan(*arguments, "--json")
        assert (returned, error) == (status, "")
        found: Plan = json.loads(output)
        return found

    return run


def names(rows: list[Row]) -> list[str]:
    return [row["name"] for row in rows]


def kind(row: Row) -> dict[str, Any]:
    """Everything but the batch sizes."""
    return {key: value for key, value in row["config"].items() if key not in BATCH_FIELDS}


def micro_batch(row: Row) -> int:
    return int(row["config"]["micro_batch_size"])


def table_rows(output: str) -> list[list[str]]:
    """The cells of every line that is about a configuration."""
    return [re.split(r"\s{2,}", line.strip()) for line in output.splitlines() if re.match(r"  z\d", line)]


HARDWARE = ["16xV100-32GB", "2xH200", "1xRTX4090", "8xA100-40GB"]


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("model", ["gpt2-xl", "gpt2"])
def test_every_configurations_parts_add_up_to_its_peak(
    document: Callable[..., Plan], hardware: str, model: str
) -> None:
    found = document("--hardware", hardware, "--model", model, *ALL)
    rows = [*found["fitting"], *found["not_fitting"]]
    assert rows
    for row in rows:
        memory = MemoryEstimate(**row["memory_bytes"])
        assert row["predicted_peak_memory_bytes"] == pytest.approx(memory.peak_bytes)
        assert memory.peak_bytes == max(memory.backward_bytes, memory.step_bytes)
        # Those of one moment: of the other nothing may be counted in.
        assert max(row["memory_bytes"].values()) <= memory.peak_bytes <= sum(row["memory_bytes"].values())
        assert all(part >= 0 for part in row["memory_bytes"].values())


def test_the_parts_are_those_of_zeros_stages(document: Callable[..., Plan]) -> None:
    """Rajbhandari et al. 2020: what each stage spreads over the ranks, of mixed-precision training with Adam."""
    found = document("--hardware", "4xH200", "--dtype", "bf16", "--global-batch", "4", *ALL)
    count, ranks = found["model_parameters"], 4
    parts = {row["config"]["zero_stage"]: row["memory_bytes"] for row in found["fitting"] if row["name"] in SMALLEST}
    assert [parts[stage]["optimizer_states"] for stage in range(4)] == [12 * count, *[12 * count / ranks] * 3]
    assert [parts[stage]["parameters"] for stage in range(3)] == [2 * count] * 3
    assert parts[3]["parameters"] < 2 * count
    assert parts[0]["step_transient"] > parts[1]["step_transient"]


@pytest.mark.parametrize("hardware", HARDWARE[:2])
def test_plan_ranks_fitting_configurations_by_predicted_speed(document: Callable[..., Plan], hardware: str) -> None:
    found = document("--hardware", hardware, *ALL)
    rates = [row["predicted_samples_per_second"] for row in found["fitting"]]
    assert rates == sorted(rates, reverse=True)
    for row in found["fitting"]:
        low, high = row["predicted_samples_per_second_ci95"]
        assert 0 < low < row["predicted_samples_per_second"] < high
        assert row["bottleneck"] in ("compute", "launch", "communication", "optimizer")
    assert names(document("--hardware", hardware, "--best", "5")["fitting"]) == names(found["fitting"])[:5]


@pytest.mark.parametrize("hardware", HARDWARE[:2])
def test_plan_lists_the_smallest_micro_batch_of_each_kind_that_does_not_fit(
    document: Callable[..., Plan], hardware: str
) -> None:
    found = document("--hardware", hardware, *ALL)
    assert not set(names(found["fitting"])) & set(names(found["not_fitting"]))
    assert all(row["probability_of_fitting"] >= 0.5 for row in found["fitting"])
    kinds = [kind(row) for row in found["not_fitting"]]
    assert all(kinds.count(each) == 1 for each in kinds)
    assert {each["zero_stage"] for each in kinds} == {1, 2, 3}  # in fp16 stage 0 is left out
    for row in found["not_fitting"]:
        assert row["probability_of_fitting"] < 0.5
        # An allocator cannot use the last percents of a GPU's memory.
        assert row["predicted_peak_memory_bytes"] > 0.95 * found["capacity_bytes"]
        fitting = [micro_batch(other) for other in found["fitting"] if kind(other) == kind(row)]
        assert micro_batch(row) == 1 or micro_batch(row) - 1 in fitting


def test_every_figure_is_said_to_be_predicted(plan: Run, document: Callable[..., Plan]) -> None:
    assert document("--hardware", "2xH200")["figures"] == "predicted"
    status, output, error = plan("--hardware", "2xH200")
    assert (status, error) == (0, "")
    assert re.fullmatch(
        r"gpt2-xl fp16, sequence length 1024, synthetic tokens on 2xH200 \(139\.8 GiB a rank\), 1558M parameters; "
        r"\d+ configurations\. Every figure is predicted\.",
        output.splitlines()[0],
    )


def test_the_table_shows_the_same_configurations_as_the_document(plan: Run, document: Callable[..., Plan]) -> None:
    # One gas for each micro-batch, so that nothing is left out of the table as all but the same.
    same_batch = ["--hardware", "16xV100-32GB", "--global-batch", "96", "--best", "4"]
    found = document(*same_batch)
    _, output, _ = plan(*same_batch, "--details")
    speeds, memory, refused = re.split(
        "Their memory a rank|Does not fit: the smallest micro-batch of each kind", output
    )
    assert "Predicted to fit, the fastest first" in speeds
    for line, row in zip(table_rows(speeds), found["fitting"], strict=True):
        assert (line[0], line[3]) == (row["name"], row["bottleneck"])
        assert float(line[2].split()[0]) == pytest.approx(row["predicted_samples_per_second"], rel=0.01)
    for text, rows in ((memory, found["fitting"]), (refused, found["not_fitting"])):
        cells = table_rows(text)
        assert [line[0] for line in cells] == names(rows)
        for line, row in zip(cells, rows, strict=True):
            assert float(line[-1]) == pytest.approx(row["predicted_peak_memory_bytes"] / GIB, abs=0.051)
            assert float(line[4]) == pytest.approx(row["memory_bytes"]["activations"] / GIB, abs=0.051)
            assert float(line[3]) == pytest.approx(row["memory_bytes"]["optimizer_states"] / GIB, abs=0.051)


def test_the_table_shows_of_each_micro_batch_the_best_accumulation_only(plan: Run) -> None:
    _, output, _ = plan("--hardware", "16xV100-32GB", "--best", "6")
    shown = [line[0] for line in table_rows(output.split("Their memory")[0])]
    assert len({re.sub(r"gas\d+_", "", name) for name in shown}) == len(shown) == 6


def test_plan_names_the_largest_parts_of_memory_where_a_stage_does_not_fit(plan: Run) -> None:
    _, output, _ = plan("--hardware", "1xRTX4090", "--details")
    assert re.search(
        r"z1_gas1_tmbspg1 needs 3\d\.\d GiB, of these 17\.4 GiB of optimizer states and \d+\.\d GiB of the optimizer "
        r"step's copies, and fragmentation leaves it about 19\.8",
        output,
    )


def test_the_global_batch_is_kept(document: Callable[..., Plan]) -> None:
    found = document("--hardware", "16xV100-32GB", "--global-batch", "192", *ALL)
    rows = [*found["fitting"], *found["not_fitting"]]
    assert rows
    for row in rows:
        config = row["config"]
        assert config["micro_batch_size"] * config["gradient_accumulation_steps"] * 16 == 192
    assert {micro_batch(row) for row in rows} <= {1, 2, 3, 4, 6, 12}


def test_the_largest_micro_and_global_batch_are_kept(document: Callable[..., Plan]) -> None:
    found = document("--hardware", "2xH200", "--max-micro-batch", "3", "--max-global-batch", "12", *ALL)
    sizes = {
        (row["config"]["micro_batch_size"], row["config"]["gradient_accumulation_steps"]) for row in found["fitting"]
    }
    assert sizes == {(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)}


def test_under_a_cap_less_fits(document: Callable[..., Plan]) -> None:
    whole = document("--hardware", "1xH200", *ALL)
    capped = document("--hardware", "1xH200", "--memory-cap", "60GiB", *ALL)
    assert (whole["capacity_bytes"], capped["capacity_bytes"]) == (CATALOGUE["H200"].memory_bytes, 60 * GIB)
    assert set(names(capped["fitting"])) < set(names(whole["fitting"]))
    moved = {row["name"]: row for row in capped["not_fitting"]}
    assert set(moved) <= set(names(whole["fitting"]))
    before = {row["name"]: row for row in whole["fitting"]}
    for name, row in moved.items():
        assert row["memory_bytes"] == before[name]["memory_bytes"]
        assert row["probability_of_fitting"] < before[name]["probability_of_fitting"]


def test_nothing_fits(plan: Run, document: Callable[..., Plan]) -> None:
    large = ["--hardware", "1xT4", "--model", LLAMA_8B, "--seq-len", "2048"]
    status, output, error = plan(*large, "--details")
    assert (status, error) == (3, "")
    assert "Nothing is predicted to fit, not even one sample a rank. With all that saves memory it would take" in output
    assert "ZeRO stage 0 is left out: in fp16 DeepSpeed" in output
    smallest = SMALLEST - {"z0_gas1_tmbspg1"}
    assert {line[0] for line in table_rows(output)} >= smallest
    found = document(*large, status=3)
    assert found["fitting"] == []
    assert set(names(found["not_fitting"])) >= smallest
    assert plan(*large, "--memory-cap", "12GiB", "--quiet") == (3, "", "")


def test_everything_fits(plan: Run, document: Callable[..., Plan]) -> None:
    small = ["--hardware", "H100", "--model", "gpt2-nano", "--seq-len", "128", "--max-global-batch", "8"]
    assert document(*small)["not_fitting"] == []
    assert "do not fit" not in plan(*small)[1]


@pytest.mark.parametrize("hardware", HARDWARE)
def test_a_plan_is_short_unless_its_details_are_asked_for(plan: Run, hardware: str) -> None:
    short = plan("--hardware", hardware, "--preset", "full")[1].splitlines()
    assert len(short) <= 16
    assert len(table_rows("\n".join(short))) == 6
    assert len(plan("--hardware", hardware, "--preset", "full", "--details")[1].splitlines()) > 3 * len(short)


def test_intervals_of_recorded_gpus_are_as_narrow_as_their_recorded_errors(document: Callable[..., Plan]) -> None:
    for row in document("--hardware", "2xH200")["fitting"]:
        low, high = row["predicted_samples_per_second_ci95"]
        assert row["bottleneck"] == "compute" and high / low < 1.3
    for row in document("--hardware", "2xA100-80GB")["fitting"]:
        low, high = row["predicted_samples_per_second_ci95"]
        assert high / low > 3


@pytest.mark.parametrize("hardware", [*CATALOGUE, "2xh200", "16 x V100-32GB", "4×L4", "NVIDIA GeForce RTX 5090"])
def test_every_gpu_of_the_catalogue_can_be_named(document: Callable[..., Plan], hardware: str) -> None:
    found = document("--hardware", hardware, "--model", "gpt2")
    name = found["hardware"].partition("x")[2]
    assert found["capacity_bytes"] == CATALOGUE[name].memory_bytes
    assert name in hardware.upper().replace(" ", "") or hardware.endswith(name)


@pytest.mark.parametrize("name", ["", "config.json"], ids=["a folder", "its file"])
def test_a_models_own_configuration_is_enough(document: Callable[..., Plan], folder: Path, name: str) -> None:
    (folder / "llama").mkdir()
    config = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "llama" / "config.json").write_text(json.dumps(config))
    found = document("--hardware", "2xH100", "--model", str(Path("llama") / name), "--max-global-batch", "8")
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found["model_parameters"] == 2 * block + 2 * 1000 * 64 + 64
    assert str(folder / "llama") in found["workload"]


def test_a_family_that_transformers_does_not_have_is_refused_as_ranks_refuse_it(plan: Run, folder: Path) -> None:
    config = {"model_type": "new", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    status, output, error = plan("--hardware", "H100", "--model", "config.json", "--max-global-batch", "8")
    assert (status, output) == (2, "")
    assert "config.json cannot be loaded: " in error and "model type `new`" in error


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("owner/name", "--model owner/name: its config.json cannot be had from the hub"),
        ("sizes", "sizes cannot be loaded: "),
    ],
    ids=["not on the hub", "no sizes"],
)
def test_a_model_whose_sizes_cannot_be_had_is_refused_in_one_sentence(
    plan: Run, folder: Path, model: str, sentence: str
) -> None:
    (folder / "sizes").mkdir()
    (folder / "sizes" / "config.json").write_text('{"model_type": "new", "hidden_size": 8}')
    status, output, error = plan("--hardware", "H100", "--model", model)
    assert (status, output) == (2, "")
    assert error.startswith("ds-tune: ") and sentence in error
    assert error.count("\n") == 1


def test_without_hardware_it_is_this_machine(document: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    found = document()
    assert found["hardware"] == "2xCPU"
    assert found["workload"] == "gpt2-nano fp32, sequence length 128, synthetic tokens"
    assert found["fitting"]


def test_nothing_is_written(plan: Run, folder: Path) -> None:
    plan("--hardware", "2xH200")
    plan("--hardware", "2xH200", "--json")
    assert list(folder.iterdir()) == []


def test_quiet_prints_nothing(plan: Run) -> None:
    assert plan("--hardware", "2xH200", "--quiet") == (0, "", "")


def test_plan_imports_no_torch_or_deepspeed(folder: Path) -> None:
    script = (
        "import sys, ds_tune.tuner.cli\n"
        "status = ds_tune.tuner.cli.main(sys.argv[1:])\n"
        "print(status, *{'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-P", "-c", script, "plan", "--hardware", "16xV100-32GB", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "0\n")
    assert json.loads(done.stdout)["hardware"] == "16xV100-32GB"
