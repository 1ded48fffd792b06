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
    assert sorted(listed) == sorted({".".join(path.parent.relative_to(CHECKOUT).parts) for path in modules})


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")}
    markers = {f"{package}/py.typed" for package in PACKAGES}
    data = markers | {"storage/study.schema.json"}
    assert installed == {str(path.relative_to(CHECKOUT)) for path in modules} | data


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    [entry_points] = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"ds-tune": "tuner.__main__:run"}
    }
