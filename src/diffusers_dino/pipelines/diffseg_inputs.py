"""What `DiffSegPipeline` makes of its inputs: arguments, checked, and the condition where no image gives one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..diffseg.clusters import FeatureClusters
from .checks import check_choice, check_number, check_numbers

__all__ = [
    "check_merging",
    "chosen_merging",
    "encode_empty_prompt",
    "for_batch",
    "listed_features",
    "listed_timesteps",
    "mask_size",
    "merge_thresholds",
]

TextEncoder = tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]

_FEATURES = ("unet", "encoder")
# Arguments of a call that are read where segments come of attention, of features of either kind, or of clusters, and
# where they are merged in either way
_OF_DENOISER = {"timestep", "size", "layers", "image_embeds", "unet_kwargs"}
_READ = {
    "attention": {*_OF_DENOISER, "sides", "weights", "add_noise"},
    "unet": _OF_DENOISER,
    "encoder": {"encoder_size", "encoder_layer"},
    "clusters": {"image_embeds", "unet_kwargs"},
    "kl": {"merge_threshold", "relative_threshold", "anchors_per_side", "refine"},
    "ncut": {"cut_threshold"},
}


def chosen_merging(
    features: str | Sequence[str], merging: str | None, clusters: FeatureClusters | None, **given: Any
) -> str:
    """The way of merging: that of a call, else DiffSeg's of attention, and DiffCut's of features.

    A ValueError if it does not go with the features, or if one of the further arguments is `given`, neither None nor
    False, that nothing reads.
    """
    by_attention = features == "attention"
    if clusters is not None:
        ways, given = ["clusters"], {"features": None if by_attention else features, "merging": merging, **given}
    else:
        merging = merging if merging is not None else "kl" if by_attention else "ncut"
        check_choice(("kl", "ncut"), merging=merging)
        ways = [*(["attention"] if by_attention else listed_features(features)), merging]
        if merging == "kl" and not by_attention:
            raise ValueError(f"merging='kl' is of attention maps: merge features={features!r} by 'ncut'.")
    read = set().union(*(_READ[way] for way in ways))
    set_ = {name: value for name, value in given.items() if value is not None and value is not False}
    idle = [f"`{name}`" for name in set_ if name not in read]
    if idle and clusters is not None:
        raise ValueError(
            "`clusters` know their features and how they are read, and take the place of merging: leave out "
            f"{' and '.join(idle)}."
        )
    if idle:
        raise ValueError(
            f"{' and '.join(idle)} would change nothing with these `features` and this `merging`: leave it out."
        )
    return merging or "ncut"


def check_merging(merging: str, cut_threshold: float = 1.0, walk_steps: int = 1, cut_power: float = 1.0) -> None:
    """Refuse a way of merging that there is not, and numbers that it cannot work with."""
    check_choice(("kl", "ncut"), merging=merging)
    check_numbers(walk_steps=walk_steps)
    check_number(0, cut_power=cut_power)
    if isinstance(cut_threshold, bool) or not isinstance(cut_threshold, Real) or not 0 < cut_threshold <= 2:
        raise ValueError(f"`cut_threshold` must be above 0 and at most 2, got {cut_threshold!r}.")


def listed_features(features: str | Sequence[str]) -> list[str]:
    """The kinds of features of a call that takes one or several, checked."""
    listed = [features] if isinstance(features, str) else list(features)
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"`features` must be one or several of {_FEATURES}, each once, got {features!r}.")
    for each in listed:
        check_choice(_FEATURES, features=each)
    return listed


def merge_thresholds(
    merge_threshold: float | Sequence[float] | None, num_merges: int, relative: bool | None, default: float
) -> tuple[list[float], bool]:
    """One threshold a pass, checked: one `num_merges` times, or those that were given; and what they are in.

    `default` is the one in relative units.
    """
    check_numbers(num_merges=num_merges)
    relative = merge_threshold is None if relative is None else bool(relative)
    if merge_threshold is None:
        merge_threshold = default if relative else 0.5
    listed = isinstance(merge_threshold, (Sequence, np.ndarray, Tensor)) and np.ndim(merge_threshold) == 1
    thresholds = list(merge_threshold) if listed else [merge_threshold] * num_merges
    if not thresholds or not all(isinstance(each, (Real, Tensor)) and each > 0 for each in thresholds):  # no NaN
        raise ValueError(f"`merge_threshold` must be above 0, got {merge_threshold!r}: at 0 no maps are similar.")
    return [float(threshold) for threshold in thresholds], relative


def mask_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of masks, checked."""
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"`output_size` must be a height and a width, or the side of a square, got {size!r}.")
    for side in pair:
        check_numbers(output_size=side)
    return pair


def listed_timesteps(timestep: int | Sequence[int], num_train_timesteps: int) -> list[int]:
    """The timesteps of a call that takes one or several, checked."""
    timesteps = list(timestep) if isinstance(timestep, Sequence) else [timestep]
    whole = all(isinstance(t, Integral) and not isinstance(t, bool) for t in timesteps)
    if not timesteps or not whole or not all(0 <= t < num_train_timesteps for t in timesteps):
        raise ValueError(
            f"`timestep` must be an integer from 0 to {num_train_timesteps - 1}, or several of them, got {timestep!r}."
        )
    return [int(t) for t in timesteps]


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
