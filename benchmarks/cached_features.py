"""How much faster a training step is with cached features than with online encoding, on the same models.

    python benchmarks/cached_features.py --output_dir outputs/cached_features

Makes tiny models of Stable Diffusion's shape (VAE with three halvings, ViT, UNet with self- and cross-attention on
random gray images), whose VAE and encoder are about a third of the online step, caches the features of two views on
disk in both types, and times steps in turn, online and cached. A step is all of it: the batch, the views, the
features, the UNet forward and backward, the optimizer. Prints medians, writes cached_features.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, HfArgumentParser

from diffusers_dino import DinoImageConditioner
from diffusers_dino.data import (
    Augmentation,
    GlobalBatchSampler,
    Preprocessing,
    TrainingViews,
    load_batches,
    open_images,
)
from diffusers_dino.training import objective
from diffusers_dino.training.feature_cache import Recipe, open_feature_cache, write_feature_cache
from diffusers_dino.training.features import FeatureEncoder
from diffusers_dino.training.models import make_scheduler

VIEWS = 2


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("outputs/cached_features"), metadata={"help": "Features and result."})
    resolution: int = field(default=128, metadata={"help": "Side of the images in pixels."})
    num_images: int = field(default=64, metadata={"help": "Images to train on."})
    batch_size: int = field(default=8, metadata={"help": "Images in a step."})
    steps: int = field(default=30, metadata={"help": "Timed steps of each kind, after three untimed ones."})
    vae_width: int = field(default=24, metadata={"help": "Channels of the VAE's first level."})
    unet_width: int = field(default=64, metadata={"help": "Channels of the UNet's first level."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    vae, conditioner, unet = make_models(args)
    images = open_images(make_images(args), Preprocessing(args.resolution), in_memory=True)
    views = TrainingViews(images, Augmentation())
    encoder = FeatureEncoder(vae, conditioner, "cpu")
    recipe = Recipe.of(vae, conditioner, views, VIEWS)
    caches = {}
    for dtype in (torch.float16, torch.float32):
        folder = args.output_dir / str(dtype).removeprefix("torch.")
        folder.mkdir(exist_ok=True)
        write_feature_cache(folder, recipe, views, encoder, Accelerator(cpu=True), dtype=dtype)
        caches[folder.name] = open_feature_cache(folder, recipe, images)
    streams = {"online": batches_of(args, views)} | {name: batches_of(args, cache) for name, cache in caches.items()}
    times = time_steps(args, streams, encoder, make_step(unet))
    online = statistics.median(times["online"])
    result = {
        "threads": torch.get_num_threads(),
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "encoding_share": statistics.median(times["encoding"]) / online,
        "speedup": {name: online / statistics.median(times[name]) for name in caches},
        "rounding": largest_rounding(caches, len(images)),
    }
    (args.output_dir / "cached_features.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def make_models(args: Arguments) -> tuple[AutoencoderKL, DinoImageConditioner, UNet2DConditionModel]:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(args.vae_width * factor for factor in (1, 2, 4, 4)),
        layers_per_block=1,
        norm_num_groups=8,
    )
    width = 96
    encoder = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=width, num_hidden_layers=4, num_attention_heads=3, image_size=args.resolution, patch_size=16
        )
    )
    normal = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    conditioner = DinoImageConditioner.from_model(encoder, size=args.resolution, **normal)
    unet = UNet2DConditionModel(
        sample_size=args.resolution // 8,
        block_out_channels=(args.unet_width, 2 * args.unet_width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=width,
    )
    return vae.requires_grad_(False).eval(), conditioner, unet


def make_images(args: Arguments) -> Path:
    """Smooth random images; what they show does not matter here."""
    folder = args.output_dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    coarse = torch.rand(args.num_images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, size=args.resolution, mode="bicubic").clamp(0, 1) * 255
    for number, image in enumerate(pixels[:, 0].byte().numpy()):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def batches_of(args: Arguments, views: Any) -> Iterator[dict[str, Any]]:
    return load_batches(views, GlobalBatchSampler(len(views), args.batch_size))


def make_step(unet: UNet2DConditionModel) -> Callable[[list[int], Tensor, Tensor, Tensor], None]:
    """One update from features, as `examples/train_dino.py` makes it."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    scheduler = make_scheduler()

    def step(positions: list[int], mean: Tensor, std: Tensor, tokens: Tensor) -> None:
        draws = objective.draw_for_training(positions, mean.shape[1:], len(scheduler))
        latents = mean + std * draws.latent_noise
        noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps)
        prediction = unet(noisy, draws.timesteps, encoder_hidden_states=tokens, return_dict=False)[0]
        objective.weighted_mse(prediction, draws.noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(
    args: Arguments, streams: dict[str, Iterator[dict[str, Any]]], encoder: FeatureEncoder, step: Callable[..., None]
) -> dict[str, list[float]]:
    """Seconds of each step, all kinds in turn, so that what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in (*streams, "encoding")}
    for number in range(args.steps + 3):
        for name, batches in streams.items():
            start = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            features = encoder(batch)
            encoded = time.perf_counter()
            step(batch["position"], *features)
            if number >= 3:
                times[name].append(time.perf_counter() - start)
                if name == "online":
                    times["encoding"].append(encoded - loaded)
    return times


def largest_rounding(caches: dict[str, Any], count: int) -> dict[str, float]:
    """Largest difference of the float16 features from the float32 ones, in their standard deviations."""
    slots = next(iter(GlobalBatchSampler(count, count, shuffle=False)))
    half, whole = (caches[name].__getitems__(slots)["features"] for name in ("float16", "float32"))
    names = ("mean", "std", "tokens")
    return {n: ((h.float() - w).abs().max() / w.std()).item() for n, h, w in zip(names, half, whole, strict=True)}


if __name__ == "__main__":
    main()
