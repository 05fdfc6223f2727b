"""Tokens from no image, after diffusers' conventions: batches, generators, guidance, files, variation, bad input."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import priors
import tiny
import tiny_text
from diffusers_dino import DinoPrior, DinoPriorPipeline
from tiny import generators

FEW = {"num_inference_steps": 3}


@pytest.fixture
def pipe():
    return priors.tiny_prior_pipeline()


@pytest.fixture
def reading():
    """A prior that also takes texts."""
    prior = priors.tiny_prior(text_dim=tiny.TOKEN_DIM, text_encoder="tiny", text_length=7)
    return DinoPriorPipeline(
        prior, priors.tiny_prior_pipeline().scheduler, tiny_text.text_encoder(), tiny_text.tokenizer()
    )


def test_tokens_of_one_condition_are_together_and_generate_images(pipe):
    tokens = pipe(
        labels=[["Edema"], ["Nodule"]], num_images_per_prompt=2, generator=generators(0, 1, 0, 1), **FEW
    ).image_embeds
    assert tokens.shape == (4, *priors.SHAPE)
    assert tokens.dtype == torch.float32
    assert not torch.allclose(tokens[0], tokens[2])
    images = tiny.tiny_pipeline()(image_embeds=tokens, num_inference_steps=2, output_type="np").images
    assert images.shape == (4, 32, 32, 1)
    assert len(pipe(num_images_per_prompt=3, **FEW).image_embeds) == 3


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_draw_is_the_same_bits_in_any_batch(pipe, guidance_scale):
    asked = [["Edema"], None, ["Nodule"], ["No Finding"]] * 5
    options = {"guidance_scale": guidance_scale, **FEW}
    together = pipe(labels=asked, generator=generators(*range(20)), **options).image_embeds
    for place in (0, 1, 15, 19):
        one = pipe(labels=[asked[place]], generator=generators(place), **options).image_embeds
        assert torch.equal(one[0], together[place])


def test_noise_of_the_steps_follows_the_generators(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    both = pipe(num_images_per_prompt=2, generator=generators(0, 1), **FEW).image_embeds
    assert torch.equal(pipe(generator=generators(1), **FEW).image_embeds[0], both[1])
    assert not torch.allclose(both[0], both[1])


def test_a_text_is_the_same_bits_in_any_batch(reading):
    together = reading(text=["a", None, "a a"], generator=generators(0, 0, 0), **FEW).image_embeds
    assert torch.equal(reading(text="a", generator=generators(0), **FEW).image_embeds[0], together[0])
    assert torch.equal(reading(generator=generators(0), **FEW).image_embeds[0], together[1])
    assert not torch.allclose(together[0], together[1])


def test_guidance_and_its_negative(pipe):
    def draw(**asked):
        return pipe(labels=["Edema"], generator=generators(0), **FEW, **asked).image_embeds

    plain, guided, away = draw(), draw(guidance_scale=3.0), draw(guidance_scale=3.0, negative_labels=["Nodule"])
    assert torch.equal(plain, draw(guidance_scale=0.5))
    assert not torch.allclose(plain, guided)
    assert not torch.allclose(guided, away)
    without = [pipe(generator=generators(0), guidance_scale=scale, **FEW).image_embeds for scale in (1.0, 5.0)]
    assert torch.equal(*without)  # there is nothing to lead to


def test_other_scales_of_noise_and_a_callback(pipe):
    noise = tiny.gaussian(1, *priors.SHAPE, dtype=torch.float32)
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        pipeline._interrupt = step == 1

    given = pipe(latents=noise, num_inference_steps=4, callback_on_step_end=watch, output_type="np")
    assert isinstance(given.image_embeds, np.ndarray)
    assert seen == [(0, (1, *priors.SHAPE)), (1, (1, *priors.SHAPE))]
    (as_tuple,) = pipe(latents=noise, return_dict=False, **FEW)
    assert torch.equal(as_tuple, pipe(latents=noise, **FEW).image_embeds)


def test_strength_goes_from_the_same_tokens_to_any(pipe):
    tokens = priors.tiny_tokens(4)
    seeds = {"generator": generators(*range(4)), "labels": [["Edema"], None, None, ["Nodule"]]}
    assert torch.equal(pipe.renoise(tokens, 0, **seeds), tokens)
    distances = [
        (pipe.renoise(tokens, strength, **{**seeds, "generator": generators(*range(4))}) - tokens).norm().item()
        for strength in (0.1, 0.4, 0.8)
    ]
    assert distances == sorted(distances)
    any_tokens = pipe(labels=seeds["labels"], generator=generators(*range(4))).image_embeds
    assert torch.allclose(pipe.renoise(tokens, 1, **{**seeds, "generator": generators(*range(4))}), any_tokens)
    assert len(pipe.renoise(tokens, 0.0, num_images_per_prompt=2)) == 8


@pytest.mark.parametrize(("shift", "strengths"), [(1.0, (0.05, 0.3, 0.5, 0.7, 0.95)), (3.0, (0.3,))])
def test_strength_is_the_share_of_the_way_to_another_image(shift, strengths):
    pipe = priors.tiny_prior_pipeline(trained=False, num_components=100)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe.prior.fit_tokens(priors.tiny_tokens(256))
    tokens = priors.tiny_tokens(256)[:64]
    known = pipe.prior.standardise(tokens).flatten(1)
    unrelated = (known - known.roll(1, 0)).square().sum(1).mean().sqrt()
    for strength in strengths:
        moved = pipe.renoise(tokens, strength, generator=torch.Generator().manual_seed(0), num_inference_steps=100)
        distance = (pipe.prior.standardise(moved).flatten(1) - known).square().sum(1).mean().sqrt()
        assert abs(distance / unrelated - strength) < 0.03
    assert [pipe.prior.noise_level(end) for end in (0, 1)] == [0, 1]


def test_a_saved_prior_gives_the_same(pipe, reading, tmp_path):
    for made, name in ((pipe, "plain"), (reading, "reading")):
        made.save_pretrained(tmp_path / name)
        loaded = DinoPriorPipeline.from_pretrained(tmp_path / name)
        asked = {"labels": "Edema", "generator": generators(0), **FEW}
        ours = made(**{**asked, "generator": generators(0)}).image_embeds
        assert torch.equal(loaded(**asked).image_embeds, ours)
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert index["prior"] == ["diffusers_dino", "DinoPrior"]
    assert index["text_encoder"] == [None, None]
    assert DinoPrior.from_pretrained(tmp_path / "plain", subfolder="prior").conditions == pipe.prior.conditions
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    loaded = DinoPriorPipeline.from_pretrained(tmp_path, dtype=dtype)
    ours, theirs = (each(generator=generators(0), **FEW).image_embeds for each in (pipe, loaded))
    assert (ours - theirs).norm() < 0.05 * ours.norm()


CPU = torch.device("cpu")
OFFLOADING = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    # what `enable_sequential_cpu_offload` does, which insists on a numbered device
    "sequential": lambda pipe: [
        cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0) for part in (pipe.prior, pipe.text_encoder)
    ],
    "groups": lambda pipe: pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level"),
}


@pytest.mark.parametrize("way", OFFLOADING)
def test_offloading_changes_nothing(reading, way):
    asked = {"labels": ["Edema"], "text": "a", "guidance_scale": 2.0}
    expected = reading(**asked, generator=generators(0), **FEW).image_embeds
    varied = reading.renoise(expected, 0.5, generator=generators(1), **FEW)
    OFFLOADING[way](reading)
    for _ in range(2):
        torch.testing.assert_close(reading(**asked, generator=generators(0), **FEW).image_embeds, expected)
        torch.testing.assert_close(reading.renoise(expected, 0.5, generator=generators(1), **FEW), varied)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"labels": ["Edema"], "absent_labels": ["Edema"]}, ValueError, "at once"),
        ({"labels": 3}, TypeError, ""),
        ({"labels": [["Edema"], None], "absent_labels": [["Nodule"]] * 3}, ValueError, "describes 2 images"),
        ({"text": "a"}, ValueError, "trained without text"),
        ({"negative_labels": ["Edema"]}, ValueError, "guidance_scale above 1"),
        ({"labels": ["Edema"], "negative_labels": ["Edema"], "guidance_scale": 2.0}, ValueError, "negative at once"),
        ({"strength": 0.5}, ValueError, "give them"),
        ({"image_embeds": priors.tiny_tokens(2), "strength": 1.5}, ValueError, r"in \[0, 1\]"),
        ({"image_embeds": priors.tiny_tokens(2), "strength": -0.1}, ValueError, r"in \[0, 1\]"),
        ({"image_embeds": priors.tiny_tokens(2), "strength": math.nan}, ValueError, r"in \[0, 1\]"),
        ({"image_embeds": priors.tiny_tokens(2) * math.nan, "strength": 0.5}, ValueError, "NaN"),
        ({"image_embeds": priors.tiny_tokens(2)[:, :1], "strength": 0.5}, ValueError, "must have shape"),
        ({"image_embeds": 50 * priors.tiny_tokens(2), "strength": 0.5}, ValueError, "not tokens of the prior"),
        ({"image_embeds": priors.tiny_tokens(2), "labels": [["Edema"]] * 3}, ValueError, "describes 3 images"),
        ({"generator": generators(0, 1)}, ValueError, "generators"),
        ({"generator": "0"}, TypeError, "torch.Generator"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
        ({"latents": torch.zeros(2, 5, 32)}, ValueError, "`latents`"),
        ({"output_type": "pil"}, ValueError, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "noise"),
        ({"metadata": {"age": math.inf}}, ValueError, "finite"),
    ],
)
def test_bad_input_is_explained(pipe, asked, error, message):
    with pytest.raises(error, match=message):
        pipe(**asked)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "by FlowMatchEulerDiscreteScheduler, and not by DDIMScheduler"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=False"),
    ],
    ids=["DDIM", "dynamic shifting"],
)
def test_other_schedulers_are_refused(pipe, scheduler, message):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(**FEW)


def test_a_text_needs_its_encoder(reading):
    mute = DinoPriorPipeline(reading.prior, reading.scheduler)
    assert torch.equal(mute(generator=generators(0), **FEW)[0], reading(generator=generators(0), **FEW)[0])
    with pytest.raises(ValueError, match="no text encoder"):
        mute(text="a")
    with pytest.raises(ValueError, match="belong together"):
        DinoPriorPipeline(reading.prior, reading.scheduler, text_encoder=reading.text_encoder)
    with pytest.raises(ValueError, match="width None"):
        DinoPriorPipeline(priors.tiny_prior(), reading.scheduler, reading.text_encoder, reading.tokenizer)


def test_nan_in_the_weights_is_not_handed_on(pipe):
    with torch.no_grad():
        pipe.prior.predict.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="NaN"):
        pipe(**FEW)


def test_another_conditioner_is_refused(pipe):
    from diffusers_dino.prior import describe_conditioner

    known = describe_conditioner(tiny.tiny_conditioner())
    made = DinoPriorPipeline(priors.tiny_prior(conditioner=known), pipe.scheduler)
    made.check_conditioner(tiny.tiny_conditioner())
    with pytest.raises(ValueError, match="another conditioner"):
        made.check_conditioner(tiny.tiny_conditioner(tokens="all"))
