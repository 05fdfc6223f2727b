"""Pipelines on a UNet of flow matching: what holds of diffusion holds there, and their schedulers do not mix."""

import json

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.schedules import scheduler_like

OPTIONS = {"num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture
def pipe() -> DinoDiffusionPipeline:
    return tiny.tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))


@pytest.fixture
def images() -> torch.Tensor:
    return tiny.random_images(3)


@pytest.mark.parametrize(
    "kind", [FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_images_do_not_depend_on_their_batch(pipe, images, kind):
    pipe.scheduler = scheduler_like(pipe.scheduler, kind)
    together = pipe(images, generator=tiny.generators(0, 1, 2), **OPTIONS).images
    single = [pipe(images[i : i + 1], generator=tiny.generators(i), **OPTIONS).images for i in range(3)]
    torch.testing.assert_close(together, torch.cat(single), atol=1e-4, rtol=0)
    pipe.enable_fixed_batch(2)
    together = pipe(images, generator=tiny.generators(0, 1, 2), **OPTIONS).images
    for i in range(3):
        assert torch.equal(pipe(images[i : i + 1], generator=tiny.generators(i), **OPTIONS).images[0], together[i])


def test_a_shift_by_the_size_of_images_is_refused(pipe, images):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=False"):
        pipe(images, **OPTIONS)


def test_segments_see_the_noise_of_the_flow(pipe, images):
    diffseg = DiffSegPipeline.from_pipe(pipe)
    clean, noised = (
        diffseg.attention_maps(images[:1], 900, add_noise=noise, generator=tiny.generators(0))
        for noise in (False, True)
    )
    assert not torch.equal(clean, noised)
    assert torch.allclose(noised.sum((-2, -1)), torch.ones(()), atol=1e-4)


def test_schedulers_of_diffusion_are_refused_also_after_loading(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    between = DinoInterpolationPipeline.from_pipe(pipe)
    for call in (lambda: pipe(images), lambda: loaded(images), lambda: between(images, images)):
        with pytest.raises(ValueError, match="trained by flow matching"):
            call()


@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_schedulers_of_flows_are_refused_by_other_models(images, tmp_path, name):
    scheduler = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")()
    pipe = tiny.tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler)
    shared = DinoDiffusionPipeline.from_pipe(pipe, scheduler=scheduler)
    pipe.scheduler = scheduler
    for each in (pipe, loaded, shared):
        with pytest.raises(ValueError, match="not trained by flow matching"):
            each(images)


def test_folders_of_before_follow_their_scheduler(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "unet/config.json"
    config = json.loads(path.read_text())
    assert config.pop("_flow_matching") is True
    path.write_text(json.dumps(config))
    assert DinoDiffusionPipeline.from_pretrained(tmp_path)(images, **OPTIONS).images.isfinite().all()


class TestGuidanceInterval:
    def test_guidance_is_off_outside(self, images):
        pipe = tiny.tiny_pipeline()
        options = {**OPTIONS, "num_inference_steps": 4}
        make = {
            (start, end): pipe(
                images,
                guidance_scale=5.0,
                guidance_start=start,
                guidance_end=end,
                generator=tiny.generators(0, 1, 2),
                **options,
            ).images
            for start, end in [(0, 1), (0, 0), (1, 1), (0.25, 0.75), (0.25, 0.74)]
        }
        plain = pipe(images, guidance_scale=1.0, generator=tiny.generators(0, 1, 2), **options).images
        assert torch.equal(make[0, 0], plain)
        assert torch.equal(make[1, 1], plain)
        assert torch.equal(make[0.25, 0.75], make[0.25, 0.74])  # the steps at 1/4 and 2/4
        assert not torch.equal(make[0.25, 0.75], make[0, 1])

    @pytest.mark.parametrize("interval", [(-0.1, 1), (0, 1.1), (0.6, 0.5), (float("nan"), 1)])
    def test_no_interval_is_refused(self, images, interval):
        start, end = interval
        with pytest.raises(ValueError, match=r"guidance_(start|end)"):
            tiny.tiny_pipeline()(images, guidance_start=start, guidance_end=end)
