"""What the package imports: downward only, and no more than diffusers and transformers bring."""

import subprocess
import sys

import pytest

from pages import REPOSITORY


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_imports_run_downward():
    """The layers are in pyproject.toml; import-linter reads them."""
    pytest.importorskip(
        "importlinter", reason="The layers are checked by import-linter: pip install diffusers-dino[dev]"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_package_itself_imports_nothing():
    assert not {"torch", "diffusers", "transformers", "numpy"} & modules_after("import diffusers_dino")


@pytest.mark.parametrize("module", ["diffusers_dino", "diffusers_dino.conditioner"])
def test_using_a_name_registers_the_package(module):
    table = "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES as table"
    modules_after(f"from {module} import DinoImageConditioner\n{table}\nassert 'diffusers_dino' in table")


@pytest.fixture(scope="module")
def diffusers_own():
    return modules_after("from diffusers import StableDiffusionPipeline")


def test_pipelines_import_no_package_that_diffusers_does_not(diffusers_own):
    """Only our own modules, and of transformers the encoders, come on top of Stable Diffusion's pipeline."""
    statement = "from diffusers_dino import DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline"
    ours = modules_after(statement)
    assert "diffusers_dino.pipelines" in ours
    packages = {name.split(".")[0] for name in ours - diffusers_own}
    assert packages <= {"diffusers_dino", "diffusers", "transformers"} | set(sys.stdlib_module_names)
    new = {name for name in ours - diffusers_own if name.split(".")[0] == "transformers"}
    assert {name.split(".")[2] for name in new if name.count(".") > 1} <= {
        *("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
    }
