"""A small encoder that a script trains: its flags, its config, and the conditioner that it becomes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from ..conditioner import DinoImageConditioner
from ..data import ImageDataset
from ..training.features import evenly_spread
from ..training.run_folder import put_result
from .arguments import flag

__all__ = ["NewEncoderArguments", "new_encoder_config", "save_as_conditioner"]

logger = logging.getLogger("diffusers_dino")


@dataclass
class NewEncoderArguments:
    """The shape of a small DINOv2 with registers that is trained from random weights, and the tokens that it gives."""

    patch_size: int = flag(16, "Side of a patch in pixels.", group="Encoder")
    hidden_size: int = flag(384, "Width of the tokens.")
    num_hidden_layers: int = flag(12, "Transformer layers.")
    num_attention_heads: int = flag(6, "Heads per layer.")
    mlp_ratio: int = flag(4, "Hidden width of the MLPs over the width of the tokens.")
    num_register_tokens: int = flag(4, "Registers: with the class token they are the condition.")
    pixel_mean: float = flag(0.5, "Subtracted from pixels in [0, 1].")
    pixel_std: float = flag(0.25, "By which the difference is divided.")
    num_statistics_images: int = flag(1024, "Images that statistics of the tokens are taken from.", group="Result")
    slot_offset: float = flag(1.0, "Strength of the fixed vector that tells a token's place; 0 for none.")


def new_encoder_config(args: NewEncoderArguments, image_size: int) -> Dinov2WithRegistersConfig:
    """The config of the encoder that the flags describe, for images of this side in pixels."""
    return Dinov2WithRegistersConfig(
        image_size=image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        mlp_ratio=args.mlp_ratio,
        num_register_tokens=args.num_register_tokens,
    )


def save_as_conditioner(
    args: NewEncoderArguments, encoder: Dinov2WithRegistersModel, images: ImageDataset, image_size: int
) -> None:
    """Put the encoder into `args.output_dir` as a conditioner whose tokens are standardised on training images."""
    folder = Path(args.output_dir)
    conditioner = DinoImageConditioner.from_model(
        encoder.cpu(),
        size=image_size,
        mean=[args.pixel_mean] * 3,
        std=[args.pixel_std] * 3,
        source=folder.resolve().name,
    )
    conditioner.fit_normalization(evenly_spread(images, args.num_statistics_images), args.slot_offset)
    put_result(folder, conditioner.save_pretrained)
    logger.info(f"The conditioner is in {folder}: {conditioner.num_tokens} tokens of {conditioner.token_dim}")
