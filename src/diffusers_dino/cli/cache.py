r"""Encode K views of every image once, so that training runs only the UNet.

    accelerate launch -m diffusers_dino cache my_training.yaml --train_data_dir /data/cxr --cache_views 4 \
        --feature_cache /data/cxr-features
    accelerate launch examples/train_dino.py my_training.yaml --train_data_dir /data/cxr \
        --feature_cache /data/cxr-features

The YAML file is that of the training run, so that both mean the same images, views and models; what only training
needs is left out. Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from ..files import lock_folder, make_writable_folder, recover_folder, refuse_other_folder, save_atomically
from ..training.feature_cache import Recipe, write_feature_cache
from ..training.features import FeatureEncoder
from ..training.models import frozen_dtype
from .arguments import flag
from .console import show_messages
from .training_flags import FeatureArguments, check_frozen_models, load_frozen, open_views

logger = logging.getLogger("diffusers_dino.cache")


@dataclass
class Arguments(FeatureArguments):
    cache_views: int = flag(1, "Views of each image to encode.", group="Cached features")
    cache_batch_size: int = flag(32, "Views encoded at once.")
    feature_cache: str | None = flag(None, "Folder that the features go to.")
    storage_dtype: Literal["float16", "float32"] = flag("float16", "Type to store; float32 takes twice the space.")
    samples_per_shard: int = flag(256, "Images in a file, and between two moments to go on from.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Of the frozen models, in place of accelerate's configuration."
    )


def main(args: Arguments) -> None:
    if not args.feature_cache:
        raise ValueError("Give the folder that the features go to as --feature_cache.")
    check_frozen_models(args)
    folder = make_writable_folder(args.feature_cache)
    refuse_other_folder(folder)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    show_messages(logger.name)
    with lock_folder(folder, ValueError) if accelerator.is_main_process else nullcontext():
        make(args, folder, accelerator)


def make(args: Arguments, folder: Path, accelerator: Accelerator) -> None:
    views = open_views(args)
    with accelerator.main_process_first():  # one process downloads
        vae, conditioner = load_frozen(args, views.images, accelerator.device)
    recipe = Recipe.of(vae, conditioner, views, args.cache_views or 1)
    if accelerator.is_main_process:
        recover_folder(folder / "conditioner")
    begun = any(folder.glob("features-*.safetensors"))
    if accelerator.is_main_process and not (begun and (folder / "conditioner").exists()):
        with save_atomically(folder / "conditioner") as place:
            conditioner.save_pretrained(place)
    precision = frozen_dtype(accelerator.mixed_precision)
    for model in (vae.requires_grad_(False).eval(), conditioner):
        nn.Module.to(model, accelerator.device, precision)
    manifest = write_feature_cache(
        folder,
        recipe,
        views,
        FeatureEncoder(vae, conditioner, accelerator.device),
        accelerator,
        dtype=getattr(torch, args.storage_dtype),
        samples_per_shard=args.samples_per_shard,
        batch_size=args.cache_batch_size,
        num_workers=args.dataloader_num_workers,
        say=logger.info,
    )
    if accelerator.is_main_process:
        size = sum(shard["size"] for shard in manifest["shards"]) / 2**20
        substitutes = sum(len(shard["substitutes"]) for shard in manifest["shards"])
        note = f" {substitutes} images cannot be read; others stand in their places." if substitutes else ""
        logger.info(f"{folder}: {manifest['num_samples']} images x {recipe.num_views} views, {size:.0f} MiB.{note}")
        logger.info(f"Train with the same config: train_dino.py ... --feature_cache {folder}")
    accelerator.end_training()
