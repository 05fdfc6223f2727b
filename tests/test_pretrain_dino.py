"""`examples/pretrain_dino.py` as a user runs it: as a process where that matters, else in this one."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

import scripts
from diffusers_dino import DinoImageConditioner
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.hub import TrainingRecord
from scripts import losses
from tiny import tiny_encoder

NUM_IMAGES, STEPS = 24, 6


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return scripts.image_folder(tmp_path_factory.mktemp("images"), NUM_IMAGES, size=40)


@pytest.fixture(scope="module")
def settings(images) -> dict:
    return {
        "train_data_dir": images,
        "resolution": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "local_crops": 2,
        "local_crop_size": 16,
        "num_prototypes": 32,
        "head_hidden_size": 32,
        "head_bottleneck_size": 16,
        "train_batch_size": 8,
        "max_train_steps": STEPS,
        "lr_warmup_steps": 1,
        "checkpointing_steps": 3,
        "diagnosis_steps": 3,
    }


@pytest.fixture
def flags(settings, tmp_path) -> dict:
    return {**settings, "output_dir": tmp_path / "dino"}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> Path:
    """A finished run in a process of its own."""
    folder = tmp_path_factory.mktemp("run") / "dino"
    scripts.run_script("pretrain_dino.py", **settings, output_dir=folder)
    return folder


def embed_all(conditioner: DinoImageConditioner, folder: Path) -> torch.Tensor:
    dataset = open_images(folder, Preprocessing(32))
    return conditioner.encode([dataset[i]["image"] for i in range(len(dataset))])


@pytest.mark.slow
def test_result_is_a_conditioner_whose_tokens_are_standardised_and_marked(trained, images):
    conditioner = DinoImageConditioner.from_pretrained(trained)
    assert (conditioner.num_tokens, conditioner.token_dim, conditioner.image_size) == (5, 16, 32)
    tokens = embed_all(conditioner, images)  # (N, 5, 16)
    assert torch.allclose(tokens.std(dim=0, correction=0), torch.ones(5, 16), atol=0.05)
    slots = tokens.mean(dim=0)
    assert 0.7 < slots.std() < 1.3
    assert torch.pdist(slots).min() > 1
    assert conditioner.null_condition(1).abs().max() == 0


@pytest.mark.slow
def test_run_leaves_log_diagnosis_and_checkpoints(trained):
    assert len(losses(trained)) == STEPS
    diagnosis = json.loads((trained / "diagnosis.json").read_text())
    assert diagnosis["step"] == STEPS
    assert diagnosis["token_std"] > 1e-3
    assert 2 < diagnosis["effective_rank"] < NUM_IMAGES
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert f"| updates | {STEPS} |" in (trained / "README.md").read_text()


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_weights(trained, flags):
    shutil.copytree(trained / "checkpoint-3", flags["output_dir"] / "checkpoint-3")
    scripts.call_script("pretrain_dino.py", **flags, resume_from_checkpoint="latest")
    ours, theirs = (DinoImageConditioner.from_pretrained(folder) for folder in (flags["output_dir"], trained))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert losses(flags["output_dir"]) == losses(trained)[3:]


@pytest.mark.slow
def test_two_processes_with_accumulation_and_bf16(flags, images):
    flags |= {"train_batch_size": 4, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    output = scripts.run_script("pretrain_dino.py", processes=2, **flags)
    assert "6 updates of 16 images" in output
    assert torch.isfinite(torch.tensor(losses(flags["output_dir"]))).all()
    assert embed_all(DinoImageConditioner.from_pretrained(flags["output_dir"]), images).isfinite().all()


def test_training_learns(flags):
    """The student comes to know the teacher's answers: the loss falls below ln K, what an ignorant one has."""
    flags |= {"max_train_steps": 150, "learning_rate": 1e-3, "koleo_weight": 0.0, "teacher_momentum": 0.95}
    flags |= {"train_batch_size": 24, "min_global_crop": 0.9, "exposure": 0.0}
    flags |= {"local_crops": 0, "local_crop_size": 12, "min_local_crop": 2.0}  # of no local crops, nothing is asked
    flags |= {"num_prototypes": 16, "teacher_temperature": 0.02, "diagnosis_steps": 0, "checkpointing_steps": 0}
    scripts.call_script("pretrain_dino.py", **flags)
    curve = losses(flags["output_dir"])
    assert sum(curve[-10:]) / 10 < 0.9 * math.log(16)


def test_goes_on_from_an_encoder_whose_shape_is_told(flags, tmp_path, caplog):
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    flags |= {"pretrained_model_name_or_path": tmp_path / "encoder", "max_train_steps": 1, "learning_rate": 0.0}
    scripts.call_script("pretrain_dino.py", **flags)
    conditioner = DinoImageConditioner.from_pretrained(flags["output_dir"])
    config = tiny_encoder().config
    assert conditioner.token_dim == config.hidden_size != flags["hidden_size"]
    assert "--hidden_size changes nothing: --pretrained_model_name_or_path has its own." in caplog.messages
    facts = TrainingRecord.load(flags["output_dir"]).facts
    shape = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens")
    assert {name: facts[name.replace("_", " ")] for name in shape} == {name: getattr(config, name) for name in shape}
    ours = conditioner.image_encoders[0].model.state_dict()
    for name, value in tiny_encoder().state_dict().items():
        if name in ours:
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patch_size": 7}, ValueError, "--image_size 32 is not a multiple of --patch_size 7"),
        ({"local_crop_size": 12}, ValueError, "--local_crop_size 12"),
        ({"min_global_crop": 1.5}, ValueError, "scale of crops"),
        ({"min_effective_rank": 20.0}, RuntimeError, "has collapsed at update 3"),
    ],
)
def test_bad_input_is_explained(flags, changes, error, message):
    with pytest.raises(error, match=message):
        scripts.call_script("pretrain_dino.py", **{**flags, **changes})


def test_missing_lightly_names_the_extra(flags, monkeypatch):
    monkeypatch.delitem(sys.modules, "pretrain_dino", raising=False)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(ImportError, match=r"pip install diffusers-dino\[train\]"):
        scripts.call_script("pretrain_dino.py", **flags)
