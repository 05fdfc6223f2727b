"""Use the installed package as a user of the wheel does: `python tests/run_wheel.py`.

Runs the README's code, then commands on a model and images given by path, in a temporary folder. For an environment
that holds the wheel and its extras `eval` and `shards` and nothing else, so it needs no pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import diffusers_dino
from diffusers_dino.cli import main as call_command
from diffusers_dino.data.sources import source_names
from pages import REPOSITORY, blocks

DATA = REPOSITORY / "examples" / "data"
TEST_PHANTOMS = DATA / "phantom-cxr" / "phantom-cxr-test-*.tar"
QUICK = "--num_inference_steps 2"
COMMANDS = [
    "sources --name nih_chest_xray14",
    "demo --help",
    "shards --output_dir shards --source images --salt_file salt --size 64 --num_workers 0",
    f"synthesise --output_dir set --model {DATA}/tiny-diffusion --data_dir {TEST_PHANTOMS} --num_images 4 {QUICK}",
    f"evaluate fidelity --output_dir fidelity --model {DATA}/tiny-diffusion --data_dir {TEST_PHANTOMS} --features tiny"
    f" --reference_dir {DATA}/phantom-cxr --num_images 8 --num_reference 8 --bootstrap_repeats 10 {QUICK}",
    f"evaluate segmentation --output_dir segmentation --pipeline {DATA}/tiny-diffusion --data {TEST_PHANTOMS}"
    " --max_samples 4 --timesteps 100 --thresholds 0.3 --untrained false --num_examples 1",
]


def main() -> None:
    run_readme()
    assert len(source_names()) > 20
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        for name in ("radiograph", "other_radiograph"):
            (Path(folder) / "images" / f"{name}.png").write_bytes((DATA / f"{name}.png").read_bytes())
        subprocess.run([sys.executable, "-m", "diffusers_dino", "--help"], check=True)
        os.chdir(folder)
        for command in COMMANDS:  # in this process, which has imported what takes seconds
            print(f"$ diffusers-dino {command}", flush=True)
            try:
                call_command(command.split())
            except SystemExit as ended:  # as --help does
                if ended.code:
                    raise
        os.chdir(REPOSITORY)
    print(Path(diffusers_dino.__file__).parent)


def run_readme() -> None:
    os.chdir(REPOSITORY)
    names = {"__name__": "__main__"}
    few, package = {"default_steps": lambda scheduler, given=None: 2}, "diffusers_dino.pipelines.pipeline_dino"
    with patch.multiple(f"{package}_diffusion", **few), patch.multiple(f"{package}_interpolation", **few):
        for block in blocks(REPOSITORY / "README.md", "python"):
            exec(compile(block.code, str(block), "exec"), names)


if __name__ == "__main__":
    main()
