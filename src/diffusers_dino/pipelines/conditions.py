"""What a UNet is given beside latents: the empty prompt of text-conditioned ones, noise, inputs for a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sampling import Generators

__all__ = ["empty_prompt", "empty_prompt_xl", "for_batch", "noise_like"]


def empty_prompt(text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """The tokens of Stable Diffusion 1 and 2 for an empty prompt: `(1, S, D)`."""
    return text_encoder(**_inputs(text_encoder, tokenizer, device))[0]


def empty_prompt_xl(
    encoders: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]], size: int, device: torch.device
) -> dict[str, Any]:
    """The condition of Stable Diffusion XL for an empty prompt and an uncropped square image.

    Args:
        encoders: Each text encoder with its tokenizer; the last one gives the pooled vector.
        size: Side of the image in pixels.
        device: Where the encoders compute.

    Returns:
        Keyword arguments of the UNet, for one image.
    """
    outputs = [
        encoder(**_inputs(encoder, tokenizer, device), output_hidden_states=True) for encoder, tokenizer in encoders
    ]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (1, S, D)
    # original size, top left corner of the crop, target size: Podell et al., arXiv 2307.01952, section 2.2
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=device, dtype=tokens.dtype)
    return {
        "encoder_hidden_states": tokens,
        "added_cond_kwargs": {"text_embeds": outputs[-1].text_embeds, "time_ids": time_ids},
    }


def for_batch(value: Any, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Tensors, also in dictionaries, of one image repeated for the batch, on the model's device and in its type."""
    if isinstance(value, Mapping):
        return {name: for_batch(item, batch_size, dtype, device) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if len(value) not in (1, batch_size):
        raise ValueError(f"An input of the UNet is for {len(value)} images, and there are {batch_size}.")
    return value.expand(batch_size, *value.shape[1:])


def noise_like(latents: Tensor, generator: Generators) -> Tensor:
    """Noise drawn in float32, so that a seed means the same in every precision."""
    if isinstance(generator, list) and len(generator) != len(latents):
        raise ValueError(
            f"A list of generators needs one for each image: {len(latents)} images, {len(generator)} generators."
        )
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=torch.float32)
    return noise.to(latents.dtype)


def _inputs(
    text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, Tensor]:
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    inputs = {"input_ids": tokens.input_ids.to(device)}
    if getattr(text_encoder.config, "use_attention_mask", False):  # as diffusers' pipelines read it
        inputs["attention_mask"] = tokens.attention_mask.to(device)
    return inputs
