"""The condition that a Stable Diffusion's UNet gets for an empty prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["empty_prompt", "empty_prompt_xl"]


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


def _inputs(
    text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, Tensor]:
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    inputs = {"input_ids": tokens.input_ids.to(device)}
    if getattr(text_encoder.config, "use_attention_mask", False):  # as diffusers' pipelines read it
        inputs["attention_mask"] = tokens.attention_mask.to(device)
    return inputs
