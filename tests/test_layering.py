"""The direction of imports, what the parent process may load, and the size and names of files."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
# Each package may import itself and those before it.
LAYERS = ("objectives", "storage", "tuner")
# Loaded by rank processes only: they take seconds to import, and torch may touch the GPUs.
RANK_ONLY = {"torch", "deepspeed", "transformers", "datasets"}
MODULES = sorted(path.relative_to(CHECKOUT) for layer in LAYERS for path in (CHECKOUT / layer).rglob("*.py"))
TESTS = sorted(path.relative_to(CHECKOUT) for path in (CHECKOUT / "tests").rglob("*.py"))

# The command line, a command line of its own, and what writes those that launch; all others name fields in backticks.
SPELLS_OPTIONS = {
    Path("tuner/cli.py"),
    Path("tuner/arguments.py"),
    Path("tuner/compare_arguments.py"),
    Path("tuner/__main__.py"),
    Path("objectives/rank/script/with_knobs.py"),
    Path("objectives/rank/train.py"),
    Path("tuner/reports/export.py"),
    Path("objectives/running/launch_line.py"),
    Path("objectives/workload/accelerate_launcher.py"),
    Path("objectives/workload/huggingface.py"),
    Path("objectives/workload/launch_words.py"),
    Path("objectives/workload/script.py"),
    Path("objectives/workload/trainer_file.py"),
}
NVIDIA_SMI = {"--query-gpu=name,memory.total,compute_cap,index,uuid", "--format=csv,noheader,nounits"}


def imported(module: Path) -> Iterator[tuple[str, int]]:
    """The package and the line of every import in a module, also those inside functions; ours by its folder's name."""
    for node in ast.walk(ast.parse((CHECKOUT / module).read_text(), filename=str(module))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            names = [node.module]
        yield from ((name.removeprefix("ds_tune.").partition(".")[0], node.lineno) for name in names)


def runs_in_a_rank(module: Path) -> bool:
    return module.is_relative_to("objectives/rank")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module: Path) -> None:
    above = set(LAYERS[LAYERS.index(module.parts[0]) + 1 :])
    forbidden = above | {"tests"} | (set() if runs_in_a_rank(module) else RANK_ONLY)
    if module.parts[0] == "objectives":
        forbidden |= {"optuna", "optuna_dashboard"}
    wrong = [f"{module}:{line} imports {name}" for name, line in imported(module) if name in forbidden]
    assert not wrong


def test_no_folder_takes_part_in_an_import_cycle() -> None:
    """A folder is one node of the graph; modules that lie in none of `objectives`' folders are one each."""
    nodes = {".".join(path.with_suffix("").parts): node_of(path) for path in MODULES}
    graph: dict[str, set[str]] = {node: set() for node in nodes.values()}
    for path in MODULES:
        for name in ours_imported_by(path):
            other = nodes.get(name, nodes.get(f"{name}.__init__"))
            if other is not None and other != node_of(path):
                graph[node_of(path)].add(other)
    assert {"objectives.rank", "objectives.running", "tuner.reports"} <= set(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def node_of(module: Path) -> str:
    folder = ".".join(module.parent.parts)
    return f"{folder}.{module.stem}" if folder in LAYERS else folder


def ours_imported_by(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((CHECKOUT / module).read_text(), filename=str(module))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ds_tune."):
            name = node.module.removeprefix("ds_tune.")
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def test_the_command_line_does_not_load_what_ranks_load() -> None:
    loaded = f"import sys, ds_tune.tuner.cli; print(*sorted({RANK_ONLY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", loaded], cwd=CHECKOUT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


def texts(module: Path) -> Iterator[tuple[str, int]]:
    """Every string constant of a module with its line, less docstrings."""
    tree = ast.parse((CHECKOUT / module).read_text(), filename=str(module))
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value, node.lineno


@pytest.mark.parametrize("module", [module for module in MODULES if module not in SPELLS_OPTIONS], ids=str)
def test_only_command_lines_spell_options(module: Path) -> None:
    option = re.compile(r"(?<![\w-])--[a-z]")
    found = [f"{module}:{line} {text}" for text, line in texts(module) if option.search(text)]
    assert [each for each in found if not any(each.endswith(f" {word}") for word in NVIDIA_SMI)] == []


def test_command_lines_spell_options() -> None:
    spelled = [text for module in SPELLS_OPTIONS for text, _ in texts(module) if text.startswith("--")]
    assert {"--trials", "--port", "--deepspeed_config", "--knob"} <= set(spelled)


@pytest.mark.parametrize("module", MODULES + TESTS, ids=str)
def test_modules_are_short_and_named_for_what_they_do(module: Path) -> None:
    assert len((CHECKOUT / module).read_text().splitlines()) < 400
    assert module.stem not in {"utils", "util", "helpers", "common", "manager"}
