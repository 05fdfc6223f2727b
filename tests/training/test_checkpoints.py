import json
import logging
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator

from diffusers_dino.training.checkpoints import (
    MANIFEST,
    CheckpointError,
    delete_old_checkpoints,
    describe_file,
    find_checkpoint,
    read_checkpoint,
    resume_run,
    save_run,
    saving_checkpoint,
)


def save(folder, step: int, text: str = "weights") -> None:
    with saving_checkpoint(folder, step, {"position": step * 4}) as partial:
        (partial / "unet").mkdir()
        (partial / "unet" / "model.bin").write_text(text)
        (partial / "optimizer.bin").write_text("moments")


def test_saved_checkpoint_is_found_with_its_facts(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 10)
    found = find_checkpoint(tmp_path)
    assert (found.path.name, found.step, found.info) == ("checkpoint-10", 10, {"position": 40})
    assert find_checkpoint(tmp_path, "checkpoint-2").step == 2
    assert find_checkpoint("elsewhere", str(tmp_path / "checkpoint-2")).step == 2
    assert find_checkpoint(tmp_path / "empty") is None


def test_nothing_appears_when_writing_fails(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(FileNotFoundError), saving_checkpoint(tmp_path, 2) as partial:
        shutil.copy(tmp_path / "missing", partial)
    assert find_checkpoint(tmp_path).step == 1
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("damage", ["no manifest", "bad manifest", "missing", "short", "changed"])
def test_latest_skips_what_is_not_complete_and_says_so(tmp_path, caplog, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "checkpoint-2"
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "bad manifest":
        (newest / "manifest.json").write_text("{")
    elif damage == "missing":
        (newest / "optimizer.bin").unlink()
    else:
        (newest / "unet" / "model.bin").write_text("weigh" if damage == "short" else "Weights")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path).step == 1
    assert "checkpoint-2" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        find_checkpoint(tmp_path, "checkpoint-2")


def test_asking_for_a_checkpoint_that_is_not_there(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint checkpoint-7, .* There: checkpoint-2, checkpoint-10\."):
        find_checkpoint(tmp_path, "checkpoint-7")
    with pytest.raises(CheckpointError, match=r"There: none\."):
        find_checkpoint(tmp_path / "empty", "checkpoint-7")


def test_old_checkpoints_and_leftovers_go(tmp_path):
    for step in (1, 2, 30):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-4.partial")
    (tmp_path / "checkpoint-best").mkdir()
    delete_old_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-30", "checkpoint-best"]
    with pytest.raises(ValueError, match="At least one"):
        delete_old_checkpoints(tmp_path, 0)


def test_a_step_can_be_saved_again_and_after_a_killed_save(tmp_path):
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / "stale").write_text("x")
    save(tmp_path, 1, "first")
    assert not (tmp_path / "checkpoint-1" / "stale").exists()
    save(tmp_path, 1, "second")
    assert (read_checkpoint(tmp_path / "checkpoint-1").path / "unet" / "model.bin").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_only_the_main_process_writes_the_manifest(tmp_path):
    waits = []
    with saving_checkpoint(tmp_path, 1, is_main_process=False, wait_for_everyone=lambda: waits.append(1)):
        pass
    assert not (tmp_path / "checkpoint-1").exists()
    assert len(waits) == 3


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"])
def test_resuming_runs_no_code_of_a_checkpoint(tmp_path, name):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(torch.optim.lr_scheduler.ConstantLR(optimizer))
    save_run(accelerator, tmp_path, 1, info={"seed": 0})
    assert resume_run(accelerator, tmp_path, "latest", {"seed": 0}).step == 1
    checkpoint = tmp_path / "checkpoint-1"
    with open(checkpoint / name, "wb") as file:
        pickle.dump({"state": Planted(tmp_path / "ran")}, file)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = describe_file(checkpoint / name)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="could run code"):
        resume_run(accelerator, tmp_path, "latest", {"seed": 0})
    assert not (tmp_path / "ran").exists()
