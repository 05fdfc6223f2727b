"""Membership inference: an overfitted model is found, an honest one passes, and what cannot be attacked is refused."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import scripts
import tiny
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation import evaluate_membership
from diffusers_dino.evaluation.membership.protocol import denoising_errors
from diffusers_dino.latents import encode_to_moments
from diffusers_dino.pixels import unit_to_vae

OPTIONS = {"timesteps": (60, 100), "num_noises": 2, "bootstrap_repeats": 100, "progress": False}


@pytest.fixture(scope="module")
def members():
    return tiny.random_images(12, channels=1, seed=3)


@pytest.fixture(scope="module")
def others():
    return tiny.random_images(12, channels=1, seed=4)


@pytest.fixture(scope="module")
def overfitted(members):
    """A pipeline whose UNet has learnt twelve images by heart."""
    return tiny.overfitted_pipeline(members)


@pytest.fixture(scope="module")
def result(overfitted, members, others):
    return evaluate_membership(overfitted, members, others, **OPTIONS)


def test_a_model_that_knows_its_images_by_heart_is_found(result):
    assert result.combined.auroc >= 0.9
    assert result.leaks
    assert result.is_comparable
    assert (result.num_training, result.num_held_out, result.by_patient) == (12, 12, False)
    assert result.blind_low <= result.blind <= result.blind_high
    assert [attack.timestep for attack in result.attacks] == [60, 100]
    for attack in (*result.attacks, result.combined):
        assert attack.low <= attack.auroc <= attack.high
        assert 0 <= attack.found <= 1


def test_an_honest_pair_of_halves_passes(overfitted, others):
    unseen = tiny.random_images(12, channels=1, seed=5)
    assert not evaluate_membership(overfitted, others, unseen, **OPTIONS).leaks
    assert not evaluate_membership(tiny.tiny_pipeline(), others, unseen, **OPTIONS).leaks


def test_sets_that_differ_by_themselves_are_said_to(others, caplog):
    darker = 0.2 * tiny.random_images(12, channels=1, seed=5)
    result = evaluate_membership(tiny.tiny_pipeline(), darker, others, **OPTIONS)
    assert not result.is_comparable
    assert not result.leaks
    assert "differ by themselves" in caplog.text


def test_errors_depend_on_seed_and_key_and_not_on_the_batch(overfitted, members):
    keys = [str(i) for i in range(12)]
    options = {"timesteps": (60, 100), "num_noises": 2, "progress": False}
    whole = denoising_errors(overfitted, members, keys, **options)
    assert whole.shape == (12, 2)
    backwards = denoising_errors(overfitted, members.flip(0), keys[::-1], batch_size=5, **options).flip(0)
    torch.testing.assert_close(whole, backwards, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole, denoising_errors(overfitted, members, keys, seed=1, **options), rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow", "distilled"])
def test_every_kind_of_prediction_has_its_error(kind, members):
    """A UNet that answers zero is wrong by the mean square of what it should have predicted."""
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else tiny.tiny_scheduler()
    if kind not in ("flow", "distilled"):
        scheduler = tiny.tiny_scheduler(prediction_type=kind)
    unet = tiny.tiny_unet(time_cond_proj_dim=8 if kind == "distilled" else None)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    pipe = tiny.tiny_pipeline(scheduler=scheduler, unet=unet)
    errors = denoising_errors(pipe, members, list("abcdefghijkl"), timesteps=(10, 900), num_noises=8, progress=False)
    with torch.no_grad():
        latents = encode_to_moments(pipe.vae, unit_to_vae(members, 1))[0].square().mean(dim=(1, 2, 3)).double()
    expected = {"sample": latents, "flow": 1 + latents, "v_prediction": 1 + 0 * latents}.get(
        kind, torch.ones(12).double()
    )
    column = 0 if kind == "v_prediction" else 1
    torch.testing.assert_close(errors[:, column], expected, rtol=0.15, atol=0.1)


def test_patients_are_drawn_whole_and_lost_images_left_out(overfitted, tmp_path, caplog):
    folders = {name: scripts.image_folder(tmp_path / name, 8, 32, seed) for name, seed in (("a", 6), ("b", 7))}
    (folders["a"] / "003.png").write_bytes(b"no image")
    images = [open_images(folder, Preprocessing(32), max_unreadable=0.5) for folder in folders.values()]
    patients = {
        "training_groups": [f"p{i // 2}" for i in range(8)],
        "held_out_groups": [f"q{i // 2}" for i in range(8)],
    }
    result = evaluate_membership(overfitted, *images, **patients, **OPTIONS)
    assert (result.num_training, result.num_held_out, result.by_patient) == (7, 8, True)
    assert "1 of 8 images cannot be read" in caplog.text
    patients["held_out_groups"] = patients["training_groups"]
    evaluate_membership(overfitted, *images, **patients, **OPTIONS)
    assert "4 patients have images in both sets" in caplog.text


def test_what_cannot_be_attacked_is_refused(pipe, members, others):
    mixed = torch.cat([others, members[:3]])
    for message, images, options in (
        ("3 of the 15 held-out images are training images", mixed, {}),
        ("two images or more of either set, got 1 held out", others[:1], {}),
        ("two images or more of either set, got 0 held out", others[:0], {}),
        ("timesteps are ascending", others, {"timesteps": ()}),
        ("timesteps are ascending", others, {"timesteps": (100, 50)}),
        ("timesteps are ascending", others, {"timesteps": (50, 50)}),
        ("timesteps are ascending", others, {"timesteps": (-1,)}),
        ("timesteps are ascending numbers from 0 to 999", others, {"timesteps": (1000,)}),
        ("num_noises and batch_size must be at least 1", others, {"num_noises": 0}),
        ("num_noises and batch_size must be at least 1", others, {"batch_size": 0}),
        ("groups of both sets", others, {"training_groups": range(12)}),
        ("one group an image", others, {"training_groups": range(12), "held_out_groups": range(3)}),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_membership(pipe, members, images, **OPTIONS | options)
