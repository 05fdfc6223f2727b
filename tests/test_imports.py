"""What the package imports: no more than diffusers and transformers bring."""

import subprocess
import sys


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_itself_imports_nothing():
    loaded = run_python("import diffusers_dino, sys; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(loaded)


# After Stable Diffusion's pipeline: each way to import from us, in a fork of its own, then what all of ours brings.
ON_TOP_OF_DIFFUSERS = """
import os
import sys
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

assert "diffusers_dino" not in LOADABLE_CLASSES
for module in ("diffusers_dino", "diffusers_dino.conditioner"):
    if (child := os.fork()) == 0:
        exec(f"from {module} import DinoImageConditioner")
        os._exit("diffusers_dino" not in LOADABLE_CLASSES)
    assert os.waitpid(child, 0)[1] == 0, f"{module} does not register the package"
before = set(sys.modules)
from diffusers_dino import DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline
print(*(set(sys.modules) - before))
"""


def test_using_a_name_registers_the_package_and_imports_no_package_that_diffusers_does_not():
    """Only our own modules, and of transformers the encoders, come on top of Stable Diffusion's pipeline."""
    new = set(run_python(ON_TOP_OF_DIFFUSERS).split())
    assert "diffusers_dino.pipelines" in new
    packages = {name.split(".")[0] for name in new}
    assert packages <= {"diffusers_dino", "diffusers", "transformers"} | set(sys.stdlib_module_names)
    encoders = {name for name in new if name.split(".")[0] == "transformers"}
    assert {name.split(".")[2] for name in encoders if name.count(".") > 1} <= {
        *("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
    }
