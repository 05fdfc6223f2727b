"""LoRA weights of tiny UNets, as a training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

import tiny
from diffusers_dino import DinoDiffusionPipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def adapter(
    seed: int, rank: int = 4, unet: UNet2DConditionModel | None = None, **options: Any
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Weights of a random adapter, and its config."""
    unet = tiny.tiny_unet() if unet is None else unet
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights="gaussian", **options)
    with tiny.seeded(seed):
        unet.add_adapter(config)
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)), config


def save_adapter(folder: Path, *arguments: Any, **options: Any) -> Path:
    """A folder with the weights of `adapter(...)`."""
    layers, config = adapter(*arguments, **options)
    DinoDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    return folder


def predict(pipe, images, **options):
    """One prediction of the UNet."""
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = pipe.encode_image(images)
    with torch.no_grad():
        return pipe.unet(latents, 500, encoder_hidden_states=embeds, cross_attention_kwargs=options or None).sample
