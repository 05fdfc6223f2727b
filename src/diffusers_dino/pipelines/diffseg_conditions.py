"""The condition of the denoiser that `DiffSegPipeline` runs, where no image gives one: the empty prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["encode_empty_prompt", "for_batch"]

TextEncoder = tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]


def encode_empty_prompt(
    unet: UNet2DConditionModel, encoders: Sequence[TextEncoder], size: int, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of a UNet of Stable Diffusion 1, 2 or XL, for one image of `size` x `size` pixels."""
    outputs = [_encode(*pair, device) for pair in encoders if pair[0] is not None]
    if unet.config.get("addition_embed_type") != "text_time":
        return {"encoder_hidden_states": outputs[0].last_hidden_state}  # (1, S, D)
    # Stable Diffusion XL, for an uncropped square image: its original size, the top left corner of the crop, its
    # target size (Podell et al., arXiv 2307.01952, section 2.2); the last text encoder gives the pooled vector
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=device, dtype=tokens.dtype)
    added = {"text_embeds": outputs[-1].text_embeds, "time_ids": time_ids}
    return {"encoder_hidden_states": tokens, "added_cond_kwargs": added}


def _encode(text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Any:
    """What a text encoder says of an empty prompt, with its hidden states."""
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    inputs = {"input_ids": tokens.input_ids.to(device)}
    if getattr(text_encoder.config, "use_attention_mask", False):  # as diffusers' pipelines read it
        inputs["attention_mask"] = tokens.attention_mask.to(device)
    return text_encoder(**inputs, output_hidden_states=True)


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
