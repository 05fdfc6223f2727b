"""Tiny random networks of every encoder family, and the checkpoints that transformers and timm write of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from diffusers_dino.conditioner import DinoImageConditioner
from tiny import seeded

MEAN, STD = [0.5307, 0.5, 0.45], [0.2583, 0.25, 0.2]  # as little like ImageNet's as RAD-DINO's
CROPPING = {
    "image_processor_type": "BitImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 36},
    "resample": 3,
    "image_mean": MEAN,
    "image_std": STD,
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
WITH_MLP = {**TINY, "intermediate_size": 64}
TIMM_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**options: Any) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**WITH_MLP), **options)


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**TINY))


def dinov2_with_registers() -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**TINY, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3() -> nn.Module:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**WITH_MLP, num_register_tokens=4))


# family: (constructor, number of global tokens)
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "dinov1": (lambda: vit(add_pooling_layer=False), 1),
    "vit-with-pooler": (vit, 2),
    "dinov2": (dinov2, 1),
    "dinov2-registers": (dinov2_with_registers, 5),
    "dinov3": (dinov3, 5),
}


# family: (timm's name, its patch, number of global tokens)
TIMM: dict[str, tuple[str, int, int]] = {
    "timm-dinov1": ("vit_small_patch16_224", 16, 1),
    "timm-dinov2": ("vit_small_patch14_dinov2", 14, 1),
    "timm-dinov2-registers": ("vit_small_patch14_reg4_dinov2", 14, 5),
    "timm-dinov3": ("vit_small_patch16_dinov3", 16, 5),
    "timm-eva02": ("eva02_tiny_patch14_224", 14, 1),
    "timm-deit-distilled": ("deit_tiny_distilled_patch16_224", 16, 2),
    "timm-beit": ("beit_base_patch16_224", 16, 1),
}


FAMILIES = [*TRANSFORMERS, *TIMM]


def save_transformers(model: nn.Module, folder: Path, processor: dict[str, Any] = CROPPING) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_timm(model: nn.Module, folder: Path, **pretrained_cfg: Any) -> Path:
    """A folder as timm itself publishes it."""
    timm.models.save_for_hf(model, folder, model_args=timm_arguments(model), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    side = model.patch_embed.img_size[0]
    config["pretrained_cfg"] |= {"input_size": [3, side, side], "mean": MEAN, "std": STD, **pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def timm_model(family: str, patches: int = 3) -> nn.Module:
    name, patch, _ = TIMM[family]
    return create_timm_model(name, num_classes=0, img_size=patches * patch)


def create_timm_model(name: str, **arguments: Any) -> nn.Module:
    """A tiny one that knows what it was created with, which timm's models themselves do from 1.0.31 on."""
    model = timm.create_model(name, **arguments, **TIMM_TINY)
    model.created_with = {**arguments, **TIMM_TINY}
    return model


def timm_arguments(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "_model_args", model.created_with))


def build(family: str) -> nn.Module:
    with seeded(7):
        model = TRANSFORMERS[family][0]() if family in TRANSFORMERS else timm_model(family)
        for parameter in model.parameters():  # biases, registers and layer scales start at constants
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def checkpoint(family: str, folder: Path) -> Path:
    save = save_transformers if family in TRANSFORMERS else save_timm
    return save(build(family), folder / family)


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def own_forward(model: nn.Module, pixels: Tensor) -> Tensor:
    """All tokens by the library's own call."""
    with torch.no_grad():
        if not isinstance(model, transformers.PreTrainedModel):
            return model.forward_features(normalized(pixels))
        options = {"interpolate_pos_encoding": True} if isinstance(model, transformers.ViTModel) else {}
        output = model(normalized(pixels), **options)
    sequence = output.last_hidden_state
    if getattr(model, "pooler", None) is None:
        return sequence
    return torch.cat([sequence[:, :1], output.pooler_output[:, None], sequence[:, 1:]], dim=1)


def pixels_for(conditioner: DinoImageConditioner, count: int = 2) -> Tensor:
    side = conditioner.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def wrap(model: nn.Module, **options: Any) -> DinoImageConditioner:
    native = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 32
    if hasattr(model, "created_with"):
        options = {"model_args": timm_arguments(model), **options}
    return DinoImageConditioner.from_model(
        model, **{"size": native, "mean": MEAN, "std": STD, "tokens": "all", **options}
    )
