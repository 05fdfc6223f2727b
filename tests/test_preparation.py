"""A model remembers how its training images were prepared, and those that it is used on are prepared the same."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
import tiny_text
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.cli.image_flags import prepared_as_sources
from diffusers_dino.cli.record import told_settings
from diffusers_dino.cli.training_flags import open_training_images
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
    *("max_train_samples", "validation_images", "in_memory", "max_unreadable", "dataloader_num_workers"),
    *("pretrained_pipeline", "revision", "variant", "conditioner", "encoder", "cache_batch_size", "feature_cache"),
    *("pretrained_model_name_or_path", "vae", "teacher", "compile_regions", "compile_mode", "exchange_steps"),
    *("unet", "transformer", "transformer_config", "unet_config", "scheduler", "num_train_epochs"),
    "perceptual_encoder",
    *("max_train_steps", "output_dir", "weights_dtype", "checkpointing_steps", "checkpointing_minutes"),
    *("checkpoints_total_limit", "resume_from_checkpoint", "overwrite_output_dir", "logging_steps", "push_to_hub"),
    *("hub_model_id", "report_to", "tracker_project_name", "allow_tf32", "gradient_checkpointing"),
    *("enable_xformers_memory_efficient_attention", "torch_compile", "channels_last", "validation_data_dir"),
    *("num_validation_images", "num_validation_variations", "metric_weights", "validation_inference_steps"),
    *("validation_guidance_scale", "diagnosis_steps", "min_effective_rank", "validation_draws", "labels"),
    *("key_column", "label_column", "exclusive_labels", "patient_column", "number_columns", "category_columns"),
    *("text_column", "text_encoder", "text_revision"),
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
    note_preparation(pipe.unet, Preprocessing(32), 3)
    pipe.save_pretrained(folder / "other")
    for path in sorted(image_folder(folder / "images", 4, size=40).iterdir()):
        framed = np.zeros((60, 60), np.uint8)
        framed[10:50, 10:50] = np.asarray(Image.open(path)) // 2 + 100
        Image.fromarray(framed).save(path)
        (folder / "pairs").mkdir(exist_ok=True)
        shutil.copy(path, folder / "pairs")
        Image.fromarray((framed > 150).astype(np.uint8) * 255).save(folder / "pairs" / f"{path.stem}.mask.png")
    (folder / "keys").write_text("000\n")
    (folder / "labels.csv").write_text("file,patient,findings\n" + "".join(f"00{n}.png,{n},Mass\n" for n in range(4)))
    (folder / "salt").write_text("a salt of 16 bytes")
    options = {"source": folder / "images", "salt_file": folder / "salt", "num_workers": 0, "size": 32}
    call_script("shards", output_dir=folder / "shards", **options)
    return folder


def test_what_was_noted_comes_back(folder):
    for kind in (DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline):
        assert stored_preparation(kind.from_pretrained(folder / "model")) == WITHOUT
    assert stored_preparation(folder / "model") == WITHOUT
    assert stored_preparation(folder / "older") is None
    assert stored_preparation(DiffSegPipeline(conditioner=tiny.tiny_conditioner())) is None
    assert stored_preparation(tiny_text.stable_diffusion()) is None
    DiffSegPipeline(conditioner=tiny.tiny_conditioner()).save_pretrained(folder / "no denoiser")
    assert stored_preparation(folder / "no denoiser") is None
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


TRAINED = {"training": "images", "training_keys": "keys", "held_out": "images"}
COMMANDS = {  # names of the folder stand for paths
    "synthesise": {"data_dir": "images", "num_images": 1, "plan_only": True},
    "evaluate fidelity": {"data_dir": "images"},
    "evaluate interpolation": {"data_dir": "images", "training_keys": "keys"},
    "evaluate augmentation": {"data_dir": "images", "labels": "labels.csv", "num_labels": 1, "size": 32},
    "evaluate membership": TRAINED,
    "evaluate memorization": {**TRAINED, "size": 32},
    "evaluate suite": {"synthetic": "images", "real": "images", "size": 32},
}


def called(folder: Path, flags: dict) -> dict:
    """Flags with the names of what is in the folder as paths."""
    names = {path.name for path in folder.iterdir()}
    return {flag: folder / value if value in names else value for flag, value in flags.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_other_images_and_ask_of_older_models(folder, tmp_path, name):
    flags = called(folder, {**COMMANDS[name], "output_dir": tmp_path / "out"})
    with pytest.raises(ValueError, match="trained with remove_borders=False"):
        call_script(name, model=folder / "model", remove_borders=True, **flags)
    with pytest.raises(ValueError, match="does not say whether borders"):
        call_script(name, model=folder / "older", **flags)


def test_masked_images_are_prepared_for_all_models_alike(folder, tmp_path):
    flags = {"data": [str(folder / "pairs")], "output_dir": tmp_path / "out", "mask_size": 32, "untrained": False}
    flags |= {"timesteps": [1], "thresholds": [0.5], "max_samples": 2, "refine": False}
    for pipelines, removed, message in (
        (["model"], True, "trained with remove_borders=False"),
        (["model", "other"], None, "trained with remove_borders=True"),
    ):
        paths = [str(folder / name) for name in pipelines]
        with pytest.raises(ValueError, match=message):
            call_script("evaluate segmentation", pipeline=paths, remove_borders=removed, **flags)


def test_labels_are_judged_on_images_that_are_prepared_as_the_sources(folder, tmp_path):
    made, options = {}, {"num_images": 2, "num_inference_steps": 1, "num_drawn": 0}
    for name in ("model", "other"):
        made[name] = [str(tmp_path / name)]
        call_script("synthesise", model=folder / name, data_dir=folder / "images", output_dir=made[name][0], **options)
    assert prepared_as_sources(made["model"]) == dataclasses.replace(WITHOUT, size=32)
    with pytest.raises(ValueError, match="judge these sets apart"):
        prepared_as_sources(made["model"] + made["other"])
    flags = called(folder, {"data_dir": "images", "labels": "labels.csv", "num_labels": 1, "size": 32})
    flags |= {"output_dir": tmp_path / "out", "remove_borders": True, "synthetic": made["model"]}
    for command in ("evaluate labels", "filter"):
        with pytest.raises(ValueError, match="trained with remove_borders=False"):
            call_script(command, **flags)
    suite = {name: flags[name] for name in ("synthetic", "size", "output_dir", "remove_borders")}
    with pytest.raises(ValueError, match="trained with remove_borders=False"):
        call_script("evaluate suite", real=folder / "images", **suite)


TRAININGS = {"train_prior.py": {}, "train_dino.py": {"rank": 2}, "distill_dino.py": {"rank": 2}}


@pytest.mark.parametrize("script", TRAININGS)
def test_what_is_added_to_a_model_sees_its_images(folder, tmp_path, script):
    flags = {"pretrained_pipeline": folder / "model", "train_data_dir": folder / "images", "resolution": 32}
    with pytest.raises(ValueError, match="trained with remove_borders=False"):
        call_script(script, remove_borders=True, output_dir=tmp_path / "out", **flags, **TRAININGS[script])


def test_training_goes_on_with_the_models_images(folder, caplog):
    args = importlib.import_module("train_prior").Arguments(train_data_dir=str(folder / "images"), resolution=32)
    for given, base, expected in (
        (None, "model", dataclasses.replace(WITHOUT, size=32)),
        (None, "older", Preprocessing(32)),
        (None, None, Preprocessing(32)),
        (False, None, Preprocessing(32, remove_borders=False)),
        (True, "model", dataclasses.replace(WITHOUT, size=32, remove_borders=True)),
    ):
        args.remove_borders = given
        caplog.clear()
        images = open_training_images(args, base and str(folder / base))
        assert images.preprocessing == expected
        assert args.remove_borders is expected.remove_borders  # which cards and checkpoints tell
        assert bool(caplog.messages) == (base == "older" or (base, given) == ("model", True))


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
