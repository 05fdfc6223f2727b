"""The picture of samples in a card: what a model makes of images that were verified to be synthetic."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import Tensor

from .. import DinoDiffusionPipeline
from ..data import ImageDataset, Preprocessing, open_images
from ..data.datasets import collate
from ..data.sharding import require_synthetic
from ..latents import decode_latents, encode_to_moments
from ..metrics.copy_gate import CopyGate
from ..pipelines.checks import default_steps, image_size
from ..pipelines.preparation import stored_preparation
from ..pixels import unit_to_vae, vae_to_unit
from ..sheets import contact_sheet
from .folder import class_of, folder_kind, sampler_of

__all__ = ["draw_samples"]


@torch.no_grad()
def draw_samples(
    folder: str | os.PathLike,
    data_dir: str | Path,
    *,
    num_samples: int = 4,
    num_variations: int = 3,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    gate: str | Path | None = None,
    lora_base: str | None = None,
    device: str | torch.device = "cpu",
) -> Image.Image:
    """Draw a row for each of a few source images: the source, then its variations or its reconstruction.

    Args:
        folder: A trained pipeline, LoRA or autoencoder.
        data_dir: Phantoms or a synthetic set, with its manifest; other images are refused.
        num_samples: How many sources, spread over the set.
        num_variations: Of each; an autoencoder reconstructs each once.
        num_inference_steps: Sampling steps; by default 25, and 4 of a distilled model.
        guidance_scale: 1 is none; by default 2, and 1 of a distilled LoRA, whose guidance is in its weights.
        seed: Of the noise.
        gate: File of a `CopyGate` that samples have to pass: a model can reproduce a training image from any source.
        lora_base: Folder or Hub id of the pipeline that a LoRA is for.
        device: Where to compute.

    Raises:
        ValueError: If the sources are not synthetic or too few, if the gate refuses a sample, if the base of a LoRA is
            missing, or if the folder holds a conditioner, which makes no images.
    """
    require_synthetic(data_dir)
    kind = folder_kind(folder)
    if kind == "conditioner":
        raise ValueError("A conditioner makes no images to show.")
    if kind == "vae":
        vae = getattr(diffusers, class_of(folder)).from_pretrained(folder).to(device)
        sources = _spread(open_images(data_dir, Preprocessing(vae.config["sample_size"], False)), num_samples)
        pixels = unit_to_vae(sources.to(device), vae.config["in_channels"])
        drawn = vae_to_unit(decode_latents(vae, encode_to_moments(vae, pixels)[0])).cpu()
    else:
        if kind == "lora" and lora_base is None:
            raise ValueError("Samples of a LoRA are drawn with the pipeline that it is for: give lora_base.")
        pipe = DinoDiffusionPipeline.from_pretrained(lora_base if kind == "lora" else folder)
        sampler = sampler_of(folder)
        if kind == "lora":
            pipe.load_lora_weights(folder)
        if sampler is not None:
            pipe.scheduler = getattr(diffusers, sampler).from_pretrained(folder, subfolder="scheduler")
        pipe.to(device).set_progress_bar_config(disable=True)
        preparation = stored_preparation(pipe) or Preprocessing(remove_borders=False)
        images = open_images(data_dir, replace(preparation, size=image_size(pipe)))
        sources = _spread(images, num_samples)
        drawn = pipe(
            sources,
            num_images_per_prompt=num_variations,
            num_inference_steps=num_inference_steps or min(25, default_steps(pipe.scheduler)),
            guidance_scale=(1.0 if sampler else 2.0) if guidance_scale is None else guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        drawn = drawn.float().cpu()
    if gate and (refused := int((~CopyGate.load(gate)(drawn)).sum())):
        raise ValueError(f"{refused} of {len(drawn)} samples are near-copies of training images: try another seed.")
    return contact_sheet(sources, drawn)


def _spread(images: ImageDataset, count: int) -> Tensor:
    """`(count, C, size, size)` in [0, 1], spread over the set."""
    if len(images) < count:
        raise ValueError(f"{count} samples were asked for, but there are {len(images)} images.")
    stride = len(images) // count
    return collate([images[number * stride] for number in range(count)])["image"]
