"""`examples/distill_encoder.py`: a small encoder that learns what a large one says of images."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import scripts
from checkpoints import save_transformers
from diffusers_dino import DinoImageConditioner
from scripts import losses
from tiny import tiny_encoder

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_transformers(tiny_encoder(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def flags(teacher, tmp_path) -> dict:
    return {
        "train_data_dir": scripts.image_folder(tmp_path / "images", NUM_IMAGES, size=40),
        "teacher": teacher,
        "resolution": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "cache_views": 2,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "lr_warmup_steps": 1,
        "checkpointing_steps": 2,
        "num_validation_images": 4,
        "output_dir": tmp_path / "student",
    }


def test_student_comes_to_explain_the_teacher_and_becomes_a_conditioner(flags):
    flags |= {"max_train_steps": 100, "learning_rate": 3e-3, "checkpointing_steps": 0, "augment": False}
    flags |= {"validation_data_dir": flags["train_data_dir"], "num_validation_images": NUM_IMAGES}
    scripts.call_script("distill_encoder.py", **flags)
    folder = flags["output_dir"]
    curve = losses(folder)
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10])
    explained = json.loads((folder / "explained_variance.json").read_text())
    assert list(explained) == ["class token", "registers", "patches"]
    assert all(0.1 < share <= 1 for share in explained.values()), explained
    conditioner = DinoImageConditioner.from_pretrained(folder)
    assert (conditioner.num_tokens, conditioner.token_dim, conditioner.image_size) == (5, 16, 32)


def test_resumed_run_ends_with_the_same_weights_and_does_not_ask_the_teacher_again(flags, tmp_path):
    scripts.call_script("distill_encoder.py", **flags)
    whole, folder = flags["output_dir"], tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    shutil.copytree(whole / "teacher", folder / "teacher")
    written = (folder / "teacher" / "features-000000.safetensors").stat().st_mtime_ns
    scripts.call_script("distill_encoder.py", **{**flags, "output_dir": folder}, resume_from_checkpoint="latest")
    assert (folder / "teacher" / "features-000000.safetensors").stat().st_mtime_ns == written
    ours, theirs = (DinoImageConditioner.from_pretrained(path).state_dict() for path in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    scripts.call_script("distill_encoder.py", **flags | {"cache_views": 1}, overwrite_output_dir=True)


def test_a_student_without_registers_learns_class_token_and_patches(flags):
    scripts.call_script("distill_encoder.py", **flags | {"num_register_tokens": 0, "max_train_steps": 2})
    assert all(map(math.isfinite, losses(flags["output_dir"])))
    assert DinoImageConditioner.from_pretrained(flags["output_dir"]).num_tokens == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "Name the encoder to distil as --teacher"),
        ({"num_register_tokens": 3}, "--num_register_tokens 3 is not a square number"),
        ({"patch_size": 7}, "--resolution 32 is not a multiple of --patch_size 7"),
        ({"cache_views": 0}, "--cache_views must be at least 1"),
        ({"num_validation_images": 1}, "--num_validation_images must be at least 2"),
        ({"num_statistics_images": 0}, "--num_statistics_images must be at least 1"),
    ],
)
def test_bad_input_is_explained(flags, changes, message):
    with pytest.raises(ValueError, match=message):
        scripts.call_script("distill_encoder.py", **{**flags, **changes})
