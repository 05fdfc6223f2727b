"""Nothing is read off the device in an update of the denoiser, nor between the first and the last denoising step.

A GPU is stood for by PyTorch's `meta` device, whose tensors have no values: what would make the host wait for a GPU
(`item`, `tolist`, `cpu`, `bool`, `nonzero`, a tensor of the host indexed by one of the device) raises there. What is
on the CPU has its values, and is sent to the device as it is to a GPU.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

import tiny
from diffusers_dino.training.features import FeatureEncoder
from diffusers_dino.training.tally import Tally

META = torch.device("meta")


def moved(pipe):
    """The pipeline with its models on the device."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, META)
    return pipe


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("settings", [{}, {"snr_gamma": 5.0, "noise_offset": 0.1}, {"flow": True}])
def test_an_update(settings, cached):
    script = importlib.import_module("train_dino")
    flow = settings.pop("flow", False)
    pipe = moved(tiny.tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler() if flow else tiny.tiny_scheduler()))
    trainable = list(pipe.unet.requires_grad_(True).parameters())
    encode = FeatureEncoder(pipe.vae.requires_grad_(False), pipe.conditioner, META)
    views = {"image": tiny.random_images(2, channels=1)}
    if cached:
        latent = torch.ones(2, tiny.LATENT_CHANNELS, tiny.LATENT_SIZE, tiny.LATENT_SIZE)
        views = {"features": (latent, latent, torch.ones(2, 5, tiny.TOKEN_DIM))}
    optimizer = SimpleNamespace(_step_supports_amp_scaling=True)  # fused ones want to know the device
    tally = Tally(Accelerator(cpu=True), optimizer, SimpleNamespace(wishes=lambda: (0.0, 0.0)), every=10)
    tally._until_exchange = 10
    for step in (1, 2):
        batch = {**views, "position": [2 * step, 2 * step + 1], "key": ["a", "b"]}
        loss = script.compute_loss(script.Arguments(**settings), pipe, pipe.unet, encode, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        assert tally.note(step, loss, norm, 1e-4, batch["key"]) == []
    assert loss.device == optimizer.found_inf.device == META


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        UniPCMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_sampling(kind):
    flow = kind is FlowMatchEulerDiscreteScheduler
    scheduler = kind() if flow else kind.from_config(tiny.tiny_scheduler().config)
    pipe = moved(tiny.tiny_pipeline(scheduler=scheduler))
    embeds = torch.ones(2, 5, tiny.TOKEN_DIM)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    latents = pipe(image_embeds=embeds, generator=tiny.generators(0, 1), output_type="latent", **options).images
    assert latents.device == META
