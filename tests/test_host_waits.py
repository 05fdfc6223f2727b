"""Nothing is read off the device in an update of a training, nor between the first and the last denoising step.

A GPU is stood for by PyTorch's `meta` device, whose tensors have no values: what would make the host wait for a GPU
(`item`, `tolist`, `cpu`, `bool`, `nonzero`, a tensor of the host indexed by one of the device) raises there. What is
on the CPU has its values, and is sent to the device as it is to a GPU. A host also waits for its own memory to be
copied to a GPU, unless it is pinned: in an update that is left to `send`.
"""

import copy
import importlib
import sys
from contextlib import nullcontext
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
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import priors
import scripts
import tiny
from diffusers_dino.data import Augmentation, Preprocessing, Slot, TrainingViews, open_images
from diffusers_dino.devices import send
from diffusers_dino.prior.table import Facts
from diffusers_dino.training.consistency import ConsistencySchedule
from diffusers_dino.training.features import FeatureEncoder
from diffusers_dino.training.prior import KnownFacts
from diffusers_dino.training.tally import Tally

META = torch.device("meta")


class OnlySent(TorchFunctionMode):
    """Refuses to copy the host's memory to the device, unless `send` does."""

    copies = (torch.tensor, torch.as_tensor, torch.Tensor.to, torch.Tensor.copy_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        source = args[-1] if func is torch.Tensor.copy_ else args[0] if args else None
        if func in self.copies and made.device == META and getattr(source, "device", None) != META:
            caller = sys._getframe(1).f_code
            assert caller is send.__code__, f"{caller.co_filename}:{caller.co_firstlineno} waits for a copy"
        return made


class NothingRead(TorchDispatchMode):
    """Refuses to read numbers out of tensors, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def moved(pipe):
    """The pipeline with its models on the device."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, META)
    return pipe


def update(loss_of, trainable, views):
    """Two updates; what the first moves to the device for good, the second does not."""
    optimizer = SimpleNamespace(_step_supports_amp_scaling=True)  # fused ones want to know the device
    tally = Tally(Accelerator(cpu=True), optimizer, SimpleNamespace(wishes=lambda: (0.0, 0.0)), every=10)
    tally._until_exchange = 10
    for step in (1, 2):
        with OnlySent() if step == 2 else nullcontext():
            batch = {**views, "position": [2 * step, 2 * step + 1], "key": ["a", "b"]}
            loss = loss_of(batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            assert tally.note(step, loss, norm, 1e-4, batch["key"]) == []
    assert loss.device == optimizer.found_inf.device == META


def cached_features():
    latent = torch.ones(2, tiny.LATENT_CHANNELS, tiny.LATENT_SIZE, tiny.LATENT_SIZE)
    return {"features": (latent, latent, torch.ones(2, 5, tiny.TOKEN_DIM))}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"snr_gamma": 5.0, "noise_offset": 0.1}, {"flow": True}, {"token_weight": 1.0}]
)
def test_an_update(settings, cached):
    script = importlib.import_module("train_dino")
    settings = dict(settings)
    flow = settings.pop("flow", False)
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else tiny.tiny_scheduler()
    vae = tiny.tiny_vae(latents_mean=[0.1] * tiny.LATENT_CHANNELS, latents_std=[2.0] * tiny.LATENT_CHANNELS)
    pipe = moved(
        tiny.tiny_pipeline(unet=tiny.tiny_unet(**tiny.ONE_LEVEL), scheduler=scheduler, vae=vae.requires_grad_(False))
    )
    encode = FeatureEncoder(pipe.vae, pipe.conditioner, META)
    update(
        lambda batch: script.compute_loss(script.Arguments(**settings), pipe, pipe.unet, encode, batch),
        list(pipe.unet.requires_grad_(True).parameters()),
        cached_features() if cached else {"image": tiny.random_images(2, channels=1)},
    )


@pytest.mark.parametrize("phases", [4, 1])
def test_an_update_of_a_distillation(phases):
    script = importlib.import_module("distill_dino")
    args = script.Arguments(phases=phases, guidance_width=32)
    pipe = tiny.tiny_pipeline()
    student = script.make_student(args, pipe.unet.requires_grad_(False)).to(META)
    target = copy.deepcopy(student).requires_grad_(False)
    pipe = moved(pipe)
    schedule = ConsistencySchedule(pipe.scheduler, 40, phases).to(META)
    encode = FeatureEncoder(pipe.vae, pipe.conditioner, META)
    update(
        lambda batch: script.compute_loss(args, pipe, student, target, schedule, encode, batch),
        list(student.parameters()),
        cached_features(),
    )


def test_an_update_of_a_prior():
    """On the CPU: the prior leaves autocast, which `meta` has not."""
    script, pipe = importlib.import_module("train_prior"), priors.tiny_prior_pipeline()
    facts = KnownFacts(["a", "b"], [Facts(), Facts()], pipe.prior.conditions)
    encode = FeatureEncoder(None, None, "cpu")
    with NothingRead():
        batch = {**cached_features(), "position": [0, 1], "key": ["a", "b"]}
        script.compute_loss(script.Arguments(), pipe, pipe.prior, encode, facts, batch).backward()
        torch.nn.utils.clip_grad_norm_(pipe.prior.parameters(), 1.0)


def test_random_views(tmp_path):
    images = open_images(scripts.image_folder(tmp_path / "images", 4, size=40), Preprocessing(tiny.IMAGE_SIZE))
    views = TrainingViews(images, Augmentation())
    loaded = views.load([Slot(0, 0, index) for index in range(4)])
    with OnlySent():
        assert views.finish(loaded, META)["image"].device == META


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_sampling(kind):
    flow = kind is FlowMatchEulerDiscreteScheduler
    scheduler = kind() if flow else kind.from_config(tiny.tiny_scheduler().config)
    pipe = moved(tiny.tiny_pipeline(unet=tiny.tiny_unet(**tiny.ONE_LEVEL), scheduler=scheduler))
    embeds = torch.ones(2, 5, tiny.TOKEN_DIM)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    latents = pipe(image_embeds=embeds, generator=tiny.generators(0, 1), output_type="latent", **options).images
    assert latents.device == META
