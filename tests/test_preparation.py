"""A model remembers how its training images were prepared, and those that it is used on are prepared the same."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.cli.record import told_settings
from diffusers_dino.data import Preprocessing
from diffusers_dino.hub.folder import model_files, part_facts
from diffusers_dino.pipelines.preparation import (
    cut_as_in_training,
    note_preparation,
    open_images_for,
    preparation_for,
    stored_preparation,
)
from scripts import EXAMPLES, call_script, image_folder, tiny_training

WITHOUT = Preprocessing(64, remove_borders=False, clip_percent=0.5, resampling="box")
# What a card need not tell: where things are, what concerns only the machine or the progress, what it is made from.
NOT_TOLD = {
    *("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column", "keys_file"),
    *(
        "max_train_samples",
        "validation_images",
        "in_memory",
        "max_unreadable",
        "dataloader_num_workers",
        "pretrained_pipeline",
        "revision",
    ),
    *("variant", "conditioner", "encoder", "cache_batch_size", "feature_cache", "pretrained_model_name_or_path"),
    *(
        "vae",
        "unet",
        "transformer",
        "transformer_config",
        "unet_config",
        "scheduler",
        "num_train_epochs",
        "max_train_steps",
        "output_dir",
        "weights_dtype",
    ),
    *("checkpointing_steps", "checkpointing_minutes", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("overwrite_output_dir", "logging_steps", "push_to_hub", "hub_model_id", "report_to", "tracker_project_name"),
    *("allow_tf32", "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "torch_compile"),
    *("channels_last", "validation_data_dir", "num_validation_images", "num_validation_variations", "metric_weights"),
    *("validation_inference_steps", "validation_guidance_scale", "diagnosis_steps", "min_effective_rank"),
    *("validation_draws", "labels", "key_column", "label_column", "exclusive_labels", "patient_column"),
    *("number_columns", "category_columns", "text_column", "text_encoder", "text_revision"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model trained on images with their borders, one that does not say, framed images, and prepared shards."""
    folder = tmp_path_factory.mktemp("preparation")
    pipe = tiny.tiny_pipeline()
    pipe.unet.register_to_config(_images=None)
    pipe.save_pretrained(folder / "older")
    note_preparation(pipe.unet, WITHOUT, 3)
    pipe.save_pretrained(folder / "model")
    for path in sorted(image_folder(folder / "images", 4, size=40).iterdir()):
        framed = np.zeros((60, 60), np.uint8)
        framed[10:50, 10:50] = np.asarray(Image.open(path)) // 2 + 100
        Image.fromarray(framed).save(path)
    (folder / "salt").write_text("a salt of 16 bytes")
    options = {"source": folder / "images", "salt_file": folder / "salt", "num_workers": 0, "size": 32}
    call_script("shards", output_dir=folder / "shards", **options)
    return folder


def test_what_was_noted_comes_back(folder):
    for kind in (DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline):
        assert stored_preparation(kind.from_pretrained(folder / "model")) == WITHOUT
    assert stored_preparation(folder / "model") == WITHOUT
    assert stored_preparation(folder / "older") is None
    uploaded = json.loads(Path(model_files(folder / "model")["unet/config.json"]).read_text())
    assert uploaded["_images"]["remove_borders"] is False
    assert {"crop", "polarity", "channels"} < set(uploaded["_images"])
    assert "borders left on" in part_facts(folder / "model")["images"]


def test_images_are_prepared_as_in_training(folder):
    assert preparation_for(folder / "model", 32) == dataclasses.replace(WITHOUT, size=32)
    images = open_images_for(folder / "model", folder / "images", 32)
    assert images[0]["image"].min() == 0  # the frame
    pipe = DinoDiffusionPipeline.from_pretrained(folder / "model")
    shown = Image.open(folder / "images/000.png")
    assert cut_as_in_training(pipe, shown).size == (60, 60)
    assert cut_as_in_training(tiny.tiny_pipeline(), shown).size == (40, 40)


def test_a_flag_against_training_is_refused_and_an_older_model_asks(folder):
    assert preparation_for(folder / "model", 32, False).clip_percent == 0.5
    with pytest.raises(ValueError, match="trained with remove_borders=False"):
        preparation_for(folder / "model", 32, True)
    with pytest.raises(ValueError, match="does not say whether borders"):
        open_images_for(folder / "older", folder / "images", 32)
    for removed in (True, False):
        assert open_images_for(folder / "older", folder / "images", 32, removed).preprocessing == Preprocessing(
            32, removed
        )
    assert open_images_for(folder / "older", str(folder / "shards"), 32).preprocessing == Preprocessing(32)


@pytest.mark.parametrize("note", [{"size": 32}, {"crop": "none"}, {"remove_borders": "maybe", "new": 1}, 3])
def test_a_note_of_another_version_is_refused(pipe, note):
    if isinstance(note, dict) and "size" not in note:
        note = {**pipe.unet.config["_images"], **note}
    pipe.unet.register_to_config(_images=note)
    with pytest.raises(ValueError, match="does not say how to prepare images"):
        stored_preparation(pipe)


COMMANDS = {
    "synthesise": {"num_images": 1, "plan_only": True},
    "evaluate fidelity": {},
    "evaluate interpolation": {"training_keys": "keys"},
    "evaluate augmentation": {"labels": "labels.csv", "num_labels": 1, "size": 32},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_other_images_and_ask_of_older_models(folder, tmp_path, name):
    (folder / "keys").write_text("000\n")
    (folder / "labels.csv").write_text("file,patient,findings\n" + "".join(f"00{n}.png,{n},Mass\n" for n in range(4)))
    flags = {"data_dir": folder / "images", "output_dir": tmp_path / "out", **COMMANDS[name]}
    flags |= {key: folder / flags[key] for key in ("training_keys", "labels") if key in flags}
    with pytest.raises(ValueError, match="trained with remove_borders=False"):
        call_script(name, model=folder / "model", remove_borders=True, **flags)
    with pytest.raises(ValueError, match="does not say whether borders"):
        call_script(name, model=folder / "older", **flags)


def test_training_notes_it(tmp_path):
    flags = tiny_training(tmp_path, 8) | {"remove_borders": False, "max_train_steps": 1}
    call_script("train_dino.py", **flags)
    assert stored_preparation(tmp_path / "out") == Preprocessing(32, remove_borders=False)
    card = (tmp_path / "out/README.md").read_text()
    assert "| remove borders | False |" in card
    assert "| noise offset | 0.0 |" in card


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*_*.py")))
def test_a_card_tells_every_setting_that_decides_over_the_weights(script):
    arguments = importlib.import_module(script).Arguments
    flags = {field.name for field in dataclasses.fields(arguments)}
    assert flags - set(told_settings(arguments())) <= NOT_TOLD
