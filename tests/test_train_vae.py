"""`examples/train_vae.py` as a user runs it: as a process where that matters, else in this one, which is faster."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

import scripts
import tiny
from checkpoints import save_transformers
from diffusers_dino.cli.training_flags import patients_of
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.images.encoding import Encoding
from diffusers_dino.data.sharding.manifest import write_shard
from diffusers_dino.hub.record import TrainingRecord
from diffusers_dino.latents import encode_to_moments
from diffusers_dino.pixels import unit_to_vae
from scripts import losses

NUM_IMAGES, STEPS = 24, 6
SETTINGS = {
    "resolution": 32,
    "block_out_channels": [8, 8, 16],
    "norm_num_groups": 4,
    "num_validation_images": 4,
    "train_batch_size": 4,
    "lr_warmup_steps": 1,
    "checkpointing_steps": 3,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return scripts.image_folder(tmp_path_factory.mktemp("images"), NUM_IMAGES, size=40)


@pytest.fixture
def flags(images, tmp_path) -> dict:
    return {**SETTINGS, "train_data_dir": images, "output_dir": tmp_path / "vae", "max_train_steps": STEPS}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """A finished run, made by the command in the script's help."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    scripts.run_script("train_vae.py", config, train_data_dir=images, output_dir=folder / "vae", max_train_steps=STEPS)
    return folder / "vae"


@pytest.mark.slow
def test_result_is_an_autoencoder_with_unit_latents(trained, images):
    vae = AutoencoderKL.from_pretrained(trained)
    assert vae.config["in_channels"] == 1
    assert vae.config["scaling_factor"] == 1
    dataset = open_images(images, Preprocessing(32))
    keys = sorted(dataset.keys)[:-4]
    pixels = torch.stack([dataset.select(keys)[i]["image"] for i in range(len(keys))])
    with torch.no_grad():
        mean, std = encode_to_moments(vae, unit_to_vae(pixels, 1))
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    spread = (mean.square() + std.square()).mean((0, 2, 3)).sqrt()
    assert torch.allclose(spread, torch.ones(4), atol=1e-3)


@pytest.mark.slow
def test_run_leaves_picture_log_and_checkpoints(trained):
    picture = Image.open(trained / "reconstructions.png")
    assert picture.size == (2 * 32, 4 * 32)  # source | reconstruction of each held-out image
    assert len(losses(trained)) == STEPS
    assert losses(trained)[-1] < losses(trained)[0]
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert json.loads((trained / "training_arguments.json").read_text())["max_train_steps"] == STEPS
    assert f"| updates | {STEPS} |" in (trained / "README.md").read_text()


def test_patients_are_held_out_whole(tmp_path):
    """Also where their images do not follow each other, as in shards."""
    prepared = {f"{number:03d}": np.full((32, 32), number, np.uint8) for number in range(24)}
    png = Encoding(Preprocessing(32), "png")
    samples = [
        (key, {"png": png.encode(image), "json": json.dumps({"patient": f"p{number % 8}"}).encode()})
        for number, (key, image) in enumerate(prepared.items())
    ]
    write_shard(tmp_path / "train-000000.tar", "train", samples)
    images = open_images(str(tmp_path / "train-000000.tar"), Preprocessing(32))
    script = importlib.import_module("train_vae")
    args = script.Arguments(train_data_dir=str(tmp_path / "train-000000.tar"), num_validation_images=5)
    training, held_out = script.split_images(args, images)
    assert (len(training), len(held_out)) == (18, 5)
    assert not set(patients_of(training)) & set(patients_of(held_out))


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_weights_and_has_the_same_seed(trained, flags):
    shutil.copytree(trained / "checkpoint-3", flags["output_dir"] / "checkpoint-3")
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        scripts.call_script("train_vae.py", **flags, resume_from_checkpoint="latest", seed=1)
    scripts.call_script("train_vae.py", **flags, resume_from_checkpoint="latest")
    ours, theirs = (AutoencoderKL.from_pretrained(folder) for folder in (flags["output_dir"], trained))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.config["latents_std"] == theirs.config["latents_std"]
    assert losses(flags["output_dir"]) == losses(trained)[3:]


def test_a_run_that_is_shortened_is_finished(trained, flags):
    shutil.copytree(trained / "checkpoint-6", flags["output_dir"] / "checkpoint-6")
    scripts.call_script("train_vae.py", **flags | {"max_train_steps": 3}, resume_from_checkpoint="latest")
    assert scripts.same_weights(flags["output_dir"], trained)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"processes": 2}, {"gradient_accumulation_steps": 2}])
def test_processes_and_accumulated_passes_follow_the_curve_of_one_batch(trained, flags, options):
    flags |= {"train_batch_size": 2, "checkpointing_steps": 0, **options}
    scripts.run_script("train_vae.py", **flags)
    assert torch.allclose(torch.tensor(losses(flags["output_dir"])), torch.tensor(losses(trained)), atol=1e-4)


def test_goes_on_from_an_autoencoder_in_bf16(trained, flags):
    flags |= {"vae": trained, "mixed_precision": "bf16", "max_train_steps": 2, "validation_steps": 1}
    del flags["block_out_channels"], flags["norm_num_groups"]
    scripts.call_script("train_vae.py", **flags)
    assert losses(flags["output_dir"])[0] < losses(trained)[0]
    facts = TrainingRecord.load(flags["output_dir"]).facts
    assert (facts["block out channels"], facts["norm num groups"]) == ([8, 8, 16], 4)
    vae = AutoencoderKL.from_pretrained(flags["output_dir"])
    assert next(vae.parameters()).dtype == torch.float32


def test_only_the_decoder_is_trained_and_the_latents_stay(trained, flags):
    flags |= {"vae": trained, "freeze_encoder": True, "crop_size": 16, "max_train_steps": 2}
    scripts.call_script("train_vae.py", **flags)
    before, after = (AutoencoderKL.from_pretrained(folder) for folder in (trained, flags["output_dir"]))
    assert before.config["latents_std"] == after.config["latents_std"]
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed
    assert not any(name.startswith(("encoder", "quant_conv")) for name in changed)


def test_a_run_with_an_adversary_and_a_perceptual_loss_goes_on_with_the_same_bits(trained, flags, tmp_path):
    flags |= {
        "perceptual_encoder": save_transformers(tiny.tiny_encoder(), tmp_path / "encoder"),
        "perceptual_size": 16,
        "vae": trained,
        "freeze_encoder": True,
        "adversarial_weight": 0.5,
        "latent_noise": 0.3,
        "checkpointing_steps": 2,
    }
    flags["checkpointing_steps"] = 2
    whole, stopped = flags | {"output_dir": flags["output_dir"] / "whole"}, flags
    scripts.call_script("train_vae.py", **whole)
    shutil.copytree(whole["output_dir"] / "checkpoint-2", stopped["output_dir"] / "checkpoint-2")
    with pytest.raises(ValueError, match="adversary"):
        scripts.call_script("train_vae.py", **{**stopped, "adversarial_weight": 0}, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="perceptual encoder"):
        scripts.call_script("train_vae.py", **stopped | {"perceptual_encoder": None}, resume_from_checkpoint="latest")
    scripts.call_script("train_vae.py", **stopped, resume_from_checkpoint="latest")
    ours, theirs, before = (
        AutoencoderKL.from_pretrained(folder) for folder in (stopped["output_dir"], whole["output_dir"], trained)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.decoder.conv_out.weight, before.decoder.conv_out.weight)
    assert torch.equal(ours.encoder.conv_in.weight, before.encoder.conv_in.weight)


@pytest.mark.parametrize("own", [{"latents_mean": [0.0] * 4, "latents_std": [0.5] * 4}, {"scaling_factor": 2.0}])
def test_noise_is_in_units_of_the_latents_deviation(own):
    script, vae = importlib.import_module("train_vae"), tiny.tiny_vae()
    vae.register_to_config(**{"latents_mean": None, "latents_std": None, "scaling_factor": 1.0, **own})
    args = script.Arguments(latent_noise=0.3, resolution=32)
    _, more = script.posterior_noise(vae, args, list(range(64)))
    assert 0 <= more.min() < 0.05
    assert 0.1 < more.max() <= 0.15


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"freeze_encoder": True}, ValueError, "name it as --vae"),
        ({"latent_noise": 0.2}, ValueError, "give --freeze_encoder"),
        ({"latent_noise": -0.2}, ValueError, "must not be negative"),
        ({"train_data_dir": None}, ValueError, "--train_data_dir"),
        ({"vae": "rgb"}, ValueError, "has in_channels 3, and --in_channels is 1"),
        ({"vae": "rgb", "in_channels": 3, "norm_num_groups": 2}, ValueError, "and --norm_num_groups is 2"),
        ({"train_batch_size": 21}, ValueError, "needs 21 images .* there are 20"),
        ({"num_validation_images": 24}, ValueError, "cannot be held out"),
        ({"resolution": 30}, ValueError, "not a multiple of the VAE's 4"),
        ({"norm_num_groups": 3}, ValueError, "does not divide"),
        ({"crop_size": 10}, ValueError, "--crop_size 10 must be a multiple of the VAE's 4"),
        ({"crop_size": 64}, ValueError, "at most --resolution 32"),
        ({"l1_weight": -1.0}, ValueError, "negative"),
        ({"adversarial_weight": -0.5}, ValueError, "negative"),
        ({"perceptual_encoder": "here", "perceptual_weight": 0.0}, ValueError, "--perceptual_weight must be positive"),
        ({"learning_rate": 1e30, "max_train_steps": 4}, FloatingPointError, "No weight was changed"),
    ],
)
def test_bad_input_is_explained(flags, tmp_path, monkeypatch, changes, error, message):
    tiny.tiny_vae(channels=3).save_pretrained(tmp_path / "rgb")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        scripts.call_script("train_vae.py", **{**flags, **changes})
