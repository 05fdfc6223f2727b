"""A short run of `benchmarks/kill_and_resume.py`: it fails unless the resumed run ends bit-identical."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"


@pytest.mark.slow
def test_killed_run_of_two_processes_ends_with_the_same_bits(tmp_path):
    flags = ["--processes", "2", "--kills", "2", "--max_train_steps", "24", "--checkpointing_steps", "3"]
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "out"), *flags]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    (run,) = json.loads((tmp_path / "out" / "kill_and_resume.json").read_text())["runs"]
    assert run["identical"] == {"weights": True, "averaged weights": True, "optimizer": True, "losses": True}
    assert len(run["kills"]) == 2
    assert run["kills"][0]["aim"] == "checkpoint"
    assert run["kills"][-1]["newest"].startswith("checkpoint-")
