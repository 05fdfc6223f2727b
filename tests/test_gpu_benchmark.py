"""`benchmarks/gpu.py` on a CPU with tiny models: nothing in it may be run for the first time on somebody's GPU."""

import gc
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """`free_memory` collects after each way: among all that the tests have imported, most of a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def gpu():
    """The script as a module."""
    return importlib.import_module("gpu")


@pytest.fixture
def timing(gpu):
    return importlib.import_module("gpu_timing")


def run(gpu, folder, *flags):
    """The JSON that a run leaves, and how it ended."""
    argv = ["gpu.py", "--size", "tiny", "--device", "cpu", "--repeats", "1", "--output", str(folder / "gpu.json")]
    ended = None
    with patch.object(sys, "argv", [*argv, *map(str, flags)]):
        try:
            gpu.main()
        except SystemExit as error:
            ended = error.code
    return json.loads((folder / "gpu.json").read_text()), ended


def test_all_parts_but_compilation(gpu, tmp_path, capsys):
    parts = [name for name in gpu.PARTS if name not in ("compiled", "training_ways", "small_model")]
    results, ended = run(gpu, tmp_path, "--parts", *parts)
    table = capsys.readouterr().out.split("## ")[-1]
    assert ended is None
    assert list(results["parts"]) == parts
    found = results["parts"]
    assert found["check"]["passed"]
    assert found["check"]["segments"] > 1
    for name, side in (("training_large", 64), ("training_small", 32)):
        assert found[name]["resolution"] == side
        assert set(found[name]["speed"]["images_per_s"]) == {"online", "online, ahead", "cached", "diffusers"}
        assert set(found[name]["speed"]["speed_over_diffusers"]) == {"online", "online, ahead", "cached"}
        assert found[name]["speed"]["images"] == found[name]["batch_size"] == 4
        assert 0 < found[name]["operations_per_image"]["cached"] < found[name]["operations_per_image"]["online"]
    ways = {"pipeline", "diffusers", "few_steps", "distilled_4_steps", "deep_cache", "fused_qkv", "no_guidance"}
    assert ways == set(found["sampling"]["peak_gb"])
    assert found["sampling"]["matrix_product"] > 0
    assert set(found["engine"]["speed"]["speed_over_loop"]) == {"engine"}
    assert all(len(seconds) == 1 for seconds in found["sampling"]["speed"]["seconds"].values())
    assert set(found["diffseg"]["speed"]["seconds"]) == {"whole", "attention", "merging"}
    assert {"on_device", "model_offload", "group_offload"} <= set(found["offloading"]["speed"]["seconds"])
    assert {"torch", "diffusers", "commit", "device"} <= set(results["machine"])
    assert re.search(r"\| training_large \| cached \| [\d.e+]+ \| [\d.]+ x \| \d+% \|", table)
    assert "| check | against the CPU | passed |" in table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Compiling every way takes many minutes of a small CPU.")
@pytest.mark.slow
def test_compilation(gpu, tmp_path):
    results, ended = run(gpu, tmp_path, "--parts", "compiled", "training_ways", "small_model", "--minutes", 60)
    assert ended is None
    assert {"pipeline, compiled blocks", "diffusers, compiled whole"} <= set(
        results["parts"]["compiled"]["speed"]["images_per_s"]
    )
    ways = {"diffusers", "cached, foreach Adam", "cached, channels-last, compiled blocks", "cached, compiled whole"}
    ways |= {"online, ahead", "online, ahead, channels-last, compiled blocks"}
    assert ways <= set(results["parts"]["training_ways"]["speed"]["images_per_s"])
    assert "read every 10, compiled" in results["parts"]["small_model"]["updates"]["images_per_s"]


def test_it_starts_where_only_the_usual_stack_is_installed(tmp_path):
    lacking = "import sys; sys.modules.update(dict.fromkeys(['webdataset', 'torchxrayvision', 'torchsde']))"
    flags = ["gpu.py", "--size", "tiny", "--device", "cpu", "--parts", "diffseg", "--repeats", "1"]
    flags += ["--output", str(tmp_path / "gpu.json")]
    program = f"{lacking}; sys.argv = {flags}; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; gpu.main()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert "error" not in json.loads((tmp_path / "gpu.json").read_text())["parts"]["diffseg"]


def test_a_part_is_stopped_in_time_and_what_it_measured_is_kept(gpu, timing, tmp_path, monkeypatch):
    def endless(bench, result):
        result["speed"] = timings = timing.SideBySide(bench.device, 2)
        timings.run({"nap": lambda: time.sleep(0.01)}, 10**6)

    monkeypatch.setitem(gpu.PARTS, "check", (endless, 1.0))
    monkeypatch.setitem(gpu.PARTS, "diffseg", (endless, 1.0))
    start = time.monotonic()
    results, ended = run(gpu, tmp_path, "--parts", "check", "diffseg", "--minutes", 0.1)
    assert time.monotonic() - start < 20  # 6 are allowed, and what the machine is asked before comes on top
    assert ended is None
    for part in results["parts"].values():
        assert 0 < part["stopped_after_s"] < 6
        assert part["speed"]["repeats"]["nap"] > 3
        assert part["speed"]["images_per_s"]["nap"] < 2 / 0.01


def test_a_part_that_fails_costs_no_other(gpu, tmp_path, monkeypatch):
    def broken(bench, result):
        result["before"] = 1
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "check", (broken, 1.0))
    results, ended = run(gpu, tmp_path, "--parts", "check", "diffseg")
    assert "check" in ended
    assert "diffseg" not in ended
    assert results["parts"]["check"]["error"] == "ValueError: no such kernel"
    assert results["parts"]["check"]["before"] == 1
    assert "error" not in results["parts"]["diffseg"]


def test_a_check_that_does_not_hold_is_a_failure(gpu, tmp_path, monkeypatch):
    parts = importlib.import_module("gpu_parts")
    monkeypatch.setattr(parts, "TOLERANCE", -1.0)
    results, ended = run(gpu, tmp_path, "--parts", "check")
    assert results["parts"]["check"]["passed"] is False
    assert ended == "Failed: check."


def test_the_batch_shrinks_until_it_fits(timing):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert timing.largest_batch([16, 8, 4, 2], attempt, torch.device("cpu")) == 4
    assert tried == [16, 8, 4]
    with pytest.raises(RuntimeError, match="not enough memory for a batch of 8"):
        timing.largest_batch([16, 8], attempt, torch.device("cpu"))

    def of_another_kind(size):
        raise RuntimeError("expected scalar type Half")

    with pytest.raises(RuntimeError, match="scalar type"):
        timing.largest_batch([2, 1], of_another_kind, torch.device("cpu"))


def test_rates_and_ratios_are_medians(timing):
    timings = timing.SideBySide(
        torch.device("cpu"), 8, "theirs", {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 40.0]}
    )
    figures = timings.figures()
    assert figures["images_per_s"] == {"ours": 4.0, "theirs": 4.0}
    assert figures["speed_over_theirs"] == {"ours": 2.0}


def test_differences_of_nan_are_infinite(gpu):
    parts = importlib.import_module("gpu_parts")
    assert parts.relative(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])) == 2.0
    assert parts.relative(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0])) == float("inf")


def test_unknown_parts_and_missing_gpus_are_told(gpu, tmp_path):
    for flags, message in ((["--parts", "trainin"], "trainin"), (["--size", "sd15"], "no GPU")):
        if message == "no GPU" and torch.cuda.is_available():
            continue
        with patch.object(sys, "argv", ["gpu.py", *flags]), pytest.raises(SystemExit, match=message):
            gpu.main()
