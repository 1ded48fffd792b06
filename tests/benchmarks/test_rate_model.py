"""Errors of predicted rates as the documentation shows them, and constants that the studies alone give."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ds_tune.objectives.cost_model.step_inputs import StepConstants

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "data"
CLAIMS = (ROOT / "benchmarks" / "results" / "cost-model.md").read_text()


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.chdir(ROOT)  # where the recorded models' configurations are found
        yield importlib.import_module("rate_model")


def test_the_documentation_shows_each_surface_as_the_script_does(script: ModuleType) -> None:
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in CLAIMS.splitlines()]
    for path in [*DATA.glob("*.jsonl"), *(DATA / "models").glob("*.jsonl")]:
        assert script.row(path) in shown


def test_the_constants_of_compute_are_those_that_fit_the_studies(script: ModuleType) -> None:
    in_use, found = StepConstants(), script.fitted(sorted((DATA / "studies").glob("*.json")))
    for name in script.FITTED:
        assert getattr(found, name) == pytest.approx(getattr(in_use, name), rel=0.05), name
    assert dataclasses.replace(found, **{name: getattr(in_use, name) for name in script.FITTED}) == in_use


def test_the_fit_comes_back_from_elsewhere(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = StepConstants()
    far = dataclasses.replace(in_use, efficiency=0.62, traffic=14.0, compiled_traffic=9.0, gap_seconds=0.1e-3)
    monkeypatch.setattr(script, "StepConstants", lambda: far)
    found = script.fitted(sorted((DATA / "studies").glob("*.json")))
    for name in script.FITTED:
        assert getattr(found, name) == pytest.approx(getattr(in_use, name), rel=0.05), name
