"""A short run of `benchmarks/kill_and_resume.py`: the resumed run ends bit-identical."""

import pytest

from kill_and_resume import Arguments, try_kills


@pytest.mark.slow
def test_killed_run_of_two_processes_ends_with_the_same_bits(tmp_path):
    run = try_kills(Arguments(tmp_path, kills=2, max_train_steps=18, checkpointing_steps=3), processes=2)
    assert run["identical"] == {"weights": True, "averaged weights": True, "optimizer": True, "losses": True}
    assert len(run["kills"]) == 2
    assert run["kills"][0]["aim"] == "checkpoint"
    assert run["kills"][-1]["newest"].startswith("checkpoint-")
