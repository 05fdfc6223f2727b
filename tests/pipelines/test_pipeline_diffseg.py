"""`DiffSegPipeline` on our models, on Stable Diffusion's and on unconditional ones, at tiny size."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffusers_dino import DiffSegPipeline
from diffusers_dino.diffseg.attention import capture_self_attention
from diffusers_dino.diffseg.merging import aggregate_attention, merge_attention, suppress
from diffusers_dino.latents import encode_to_moments
from tiny_text import stable_diffusion, stable_diffusion_xl

EXAMPLES = Path(__file__).parents[2] / "examples/data"
RELATIVE = {"merge_threshold": 0.3, "relative_threshold": True}  # random weights attend almost evenly


@pytest.fixture
def diffseg(pipe):
    return DiffSegPipeline.from_pipe(pipe)


def test_the_steps_by_hand(pipe, diffseg, images):
    output = diffseg(images, timestep=300, **RELATIVE)
    assert output.masks.shape == (4, 32, 32)
    assert output.masks.dtype == torch.int64
    with torch.no_grad(), capture_self_attention(pipe.unet) as maps:
        pixels = images * 2 - 1 if pipe.vae.config.in_channels == 3 else images.mean(1, keepdim=True) * 2 - 1
        latents = encode_to_moments(pipe.vae, pixels)[0]
        pipe.unet(latents, 300, encoder_hidden_states=pipe.encode_image(images))
    for i in range(4):
        aggregated = aggregate_attention({side: each[i : i + 1] for side, each in maps.items()})
        flat = aggregated.flatten(1).double()
        divergence = torch.stack([((flat - x) * (flat.log() - x.log())).sum(1) / 2 for x in flat]).mean()
        merged = merge_attention(aggregated, [0.3 * divergence] * 3, anchors_per_side=8)
        assert torch.allclose(output.maps[i], merged, atol=1e-6)
        assert torch.equal(output.masks[i], suppress(output.maps[i], 32))
        assert output.num_segments[i] == len(output.masks[i].unique()) > 1


def test_a_sweep_computes_the_maps_once(diffseg, images):
    maps = diffseg.attention_maps(images[:2], timestep=100)
    assert maps.shape == (2, 64, 8, 8)
    for fraction in (0.1, 0.5):
        swept = diffseg.segment(maps, fraction, relative_threshold=True, output_size=32)
        once = diffseg(images[:2], timestep=100, merge_threshold=fraction, relative_threshold=True)
        assert torch.equal(swept.masks, once.masks)


def test_several_timesteps_are_averaged(diffseg, images):
    mean = diffseg.attention_maps(images[0], timestep=[100, 700])
    parts = [diffseg.attention_maps(images[0], timestep=t) for t in (100, 700)]
    assert torch.allclose(mean, (parts[0] + parts[1]) / 2, atol=1e-6)
    assert not torch.allclose(parts[0], parts[1], atol=1e-6)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_is_that_of_the_schedule_with_any_scheduler(pipe, diffseg, images, scheduler):
    clean = diffseg.attention_maps(images[:2])
    expected = diffseg.attention_maps(images[:2], add_noise=True, generator=tiny.generators(0, 1))
    assert not torch.allclose(clean, expected, atol=1e-5)
    diffseg.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    noisy = diffseg.attention_maps(images[:2], add_noise=True, generator=tiny.generators(0, 1))
    assert torch.allclose(noisy, expected, atol=1e-6)
    second = diffseg.attention_maps(images[1], add_noise=True, generator=tiny.generators(1))
    assert torch.allclose(second[0], expected[1], atol=1e-6)


def test_any_resolution(diffseg):
    image = tiny.random_images(1, size=50)
    maps = diffseg.attention_maps(image, size=72)
    assert maps.shape == (1, 18 * 18, 18, 18)
    assert diffseg(image, size=72, **RELATIVE).masks.shape == (1, 50, 50)
    assert diffseg.attention_maps(image, size=72, sides=[9]).shape == (1, 81, 9, 9)


def test_an_image_that_is_not_square_is_seen_whole(diffseg):
    left = tiny.random_images(1)[0]
    wide = torch.cat([left, left.flip(-1)], dim=-1)  # (3, 32, 64)
    assert diffseg(wide, **RELATIVE).masks.shape == (1, 32, 64)
    squeezed = torch.nn.functional.interpolate(wide[None], size=(64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(diffseg.attention_maps(wide), diffseg.attention_maps(squeezed), atol=1e-6)
    moved = torch.cat([1 - left, left.flip(-1)], dim=-1)  # differs in what a central crop would lose
    assert not torch.allclose(diffseg.attention_maps(wide), diffseg.attention_maps(moved), atol=1e-5)


def test_outputs(diffseg):
    image = Image.fromarray(np.uint8(255 * tiny.random_images(1)[0].permute(1, 2, 0)))
    masks, maps, counts = diffseg(image, output_type="np", output_size=(20, 30), return_dict=False, **RELATIVE)
    assert isinstance(masks, np.ndarray)
    assert (masks.shape, masks.dtype) == ((1, 20, 30), np.int64)
    assert len(maps) == len(counts) == 1
    assert masks.max() < len(maps[0])


def test_the_defaults_find_segments_with_the_bundled_model(diffseg):
    bundled = DiffSegPipeline.from_pretrained(EXAMPLES / "tiny-diffusion")
    image = Image.open(EXAMPLES / "radiograph.png")
    assert 2 <= bundled(image).num_segments[0] <= 8
    maps = bundled.attention_maps(image)
    same = [bundled.segment(maps, **options).masks for options in ({}, {"relative_threshold": True})]
    same.append(bundled.segment(maps, bundled.settings.merge_threshold, relative_threshold=True).masks)
    assert all(torch.equal(each, same[0]) for each in same)
    absolute = [
        bundled.segment(maps, **options) for options in ({"merge_threshold": 0.5}, {"relative_threshold": False})
    ]
    assert torch.equal(absolute[0].masks, absolute[1].masks)


def test_one_threshold_a_pass(diffseg, images):
    maps = diffseg.attention_maps(images[:1])
    fractions = [0.1, 0.5]
    mean = [diffseg.segment(maps, fractions, relative_threshold=True).maps[0]]
    for_all = diffseg.segment(maps, 0.1, num_merges=2, relative_threshold=True).maps[0]
    assert len(mean[0]) < len(for_all)


def test_a_constant_image(diffseg):
    for options in (RELATIVE, {"merge_threshold": 0.05}):
        output = diffseg(torch.full((1, 3, 32, 32), 0.5), refine=True, **options)
        assert torch.isfinite(output.maps[0]).all()
        assert 1 <= output.num_segments[0] <= len(output.maps[0])


def test_stable_diffusion_sees_the_empty_prompt(images):
    vanilla = stable_diffusion()
    diffseg = DiffSegPipeline.from_pipe(vanilla)
    prompt = vanilla.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)[0]
    assert torch.allclose(diffseg.encode_condition([images[0]])["encoder_hidden_states"], prompt, atol=1e-6)
    output = diffseg(images[:2], **RELATIVE)
    assert output.masks.shape == (2, 32, 32)
    given = diffseg(images[:2], image_embeds=prompt.expand(2, -1, -1), **RELATIVE)
    assert torch.equal(output.masks, given.masks)


def test_stable_diffusion_xl(images):
    vanilla = stable_diffusion_xl()
    diffseg = DiffSegPipeline.from_pipe(vanilla)
    tokens, _, pooled, _ = vanilla.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    condition = diffseg.encode_condition([images[0]], 32)
    assert torch.allclose(condition["encoder_hidden_states"], tokens, atol=1e-6)
    assert torch.allclose(condition["added_cond_kwargs"]["text_embeds"], pooled, atol=1e-6)
    assert condition["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    assert diffseg(images[:2], **RELATIVE).masks.shape == (2, 32, 32)


def test_a_small_autoencoder(images):
    diffseg = DiffSegPipeline.from_pipe(tiny.tiny_pipeline(vae=tiny.tiny_taesd()))
    assert diffseg(images, **RELATIVE).masks.shape == (4, 32, 32)


def test_an_unconditional_unet_on_pixels():
    diffseg = DiffSegPipeline(tiny.tiny_unconditional_unet(), tiny.tiny_scheduler())
    output = diffseg(tiny.random_images(2), **RELATIVE)
    assert output.masks.shape == (2, 32, 32)
    assert output.maps[0].shape[1:] == (8, 8)


def aligned(pipe):
    """The weights of a file lie in memory as they lie in the file, which changes the last bit on some processors."""
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    return pipe


@pytest.mark.parametrize("make", [tiny.tiny_pipeline, stable_diffusion, stable_diffusion_xl])
def test_a_saved_pipeline_segments_the_same(tmp_path, images, make):
    diffseg = DiffSegPipeline.from_pipe(make())
    expected = diffseg.attention_maps(images[:1])
    diffseg.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiffSegPipeline"
    loaded = DiffSegPipeline.from_pretrained(tmp_path)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in diffseg.components.items()
    }
    assert torch.equal(aligned(loaded).attention_maps(images[:1]), expected)
