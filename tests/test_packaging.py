"""The wheel holds the three packages, their type markers and the command, and nothing else."""

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("objectives", "storage", "tuner")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools writes build/ beside the sources, and takes old files from it.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    for name in (*PACKAGES, "bin", "tests"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder / "dist", folder], check=True)
    [path] = (folder / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_every_package_is_listed() -> None:
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    modules = [path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")]
    folders = {path.parent.relative_to(CHECKOUT) for path in modules}
    assert sorted(listed) == sorted(".".join(("ds_tune", *folder.parts)) for folder in folders)


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")}
    markers = {f"{package}/py.typed" for package in PACKAGES}
    data = markers | {"tuner/reports/study.schema.json", "tuner/comparison/comparison.schema.json"}
    assert installed == {f"ds_tune/{name}" for name in {str(path.relative_to(CHECKOUT)) for path in modules} | data}


def test_user_packages_named_like_the_folders_are_imported_beside_ours(tmp_path: Path) -> None:
    """A script's own folder comes first on its path, as Python puts it there, and ours are loaded in its process."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"OWNER = 'user of {package}'\n")
    imports = "; ".join(f"import {package}, ds_tune.{package}; print({package}.OWNER)" for package in PACKAGES)
    (tmp_path / "train.py").write_text(f"{imports}\nimport ds_tune.objectives.trial\n")
    result = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"user of {package}" for package in PACKAGES]


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    [entry_points] = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"ds-tune": "ds_tune.tuner.__main__:run"}
    }
