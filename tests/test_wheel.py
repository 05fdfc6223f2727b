"""The wheel holds the whole package, and works without the repository's code."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pages import REPOSITORY

PACKAGE = REPOSITORY / "src" / "diffusers_dino"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as for a release, from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "src", folder / "source" / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source" / name)
    run_pip("wheel", "--no-deps", "--wheel-dir", folder / "dist", folder / "source")
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def run_pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(PACKAGE.parent).as_posix() for path in files}


@pytest.mark.slow
def test_the_wheel_runs_the_readme_and_the_commands(wheel, tmp_path):
    run_pip("install", "--no-deps", "--target", tmp_path / "site", wheel)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, REPOSITORY / "tests" / "run_wheel.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "site" / "diffusers_dino")
