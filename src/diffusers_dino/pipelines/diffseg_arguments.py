"""What `DiffSegPipeline` makes of its arguments: thresholds, timesteps, sizes and features, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from ..diffseg.clusters import FeatureClusters
from .checks import check_choice, check_number, check_numbers

__all__ = [
    "FEATURES",
    "check_merging",
    "chosen_merging",
    "listed_features",
    "listed_timesteps",
    "mask_size",
    "merge_thresholds",
    "refuse_idle",
]

FEATURES = ("unet", "encoder")

Settings = Mapping[str, Any]


def check_merging(merging: str, cut_threshold: float = 1.0, walk_steps: int = 1, cut_power: float = 1.0) -> None:
    """Refuse a way of merging that there is not, and numbers that it cannot work with."""
    check_choice(("kl", "ncut"), merging=merging)
    check_numbers(walk_steps=walk_steps)
    check_number(0, cut_power=cut_power)
    if isinstance(cut_threshold, bool) or not isinstance(cut_threshold, Real) or not 0 < cut_threshold <= 2:
        raise ValueError(f"`cut_threshold` must be above 0 and at most 2, got {cut_threshold!r}.")


def chosen_merging(
    features: str | Sequence[str], merging: str | None, clusters: FeatureClusters | None, **settings: Any
) -> str:
    """The way of merging: that of a call, else DiffSeg's of attention, and DiffCut's of features.

    A ValueError if it does not go with the features, or with clusters, which take its place and have `settings` of
    their own.
    """
    by_attention = features == "attention"
    given = {"features": None if by_attention else features, "merging": merging, **settings}
    if clusters is not None and (named := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            "`clusters` know their features and how they are read, and take the place of merging: leave out "
            f"{' and '.join(f'`{name}`' for name in named)}."
        )
    if not by_attention:
        listed_features(features)
        if merging == "kl":
            raise ValueError(f"merging={merging!r} is of attention maps: merge features={features!r} by 'ncut'.")
    return merging if merging is not None else "kl" if by_attention else "ncut"


def refuse_idle(
    features: str | Sequence[str],
    merging: str,
    clusters: FeatureClusters | None,
    *,
    of_attention: Settings,
    of_denoiser: Settings,
    of_encoder: Settings,
    of_merging: Settings,
    of_cutting: Settings,
) -> None:
    """Refuse what was given and nothing reads, such as arguments of the denoiser where only encoders are read."""
    by_attention, idle = features == "attention" and clusters is None, {}
    kinds = [] if by_attention or clusters is not None else listed_features(features)
    if not by_attention:
        idle |= of_attention
    if kinds == ["encoder"]:
        idle |= of_denoiser
    if clusters is None and "encoder" not in kinds:
        idle |= of_encoder
    if not by_attention or merging == "ncut":
        idle |= of_merging
    if clusters is not None or merging == "kl":
        idle |= of_cutting
    if named := [name for name, value in idle.items() if value is not None and value is not False]:
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in named)} would change nothing with these `features`, `merging` or "
            "`clusters`: leave it out."
        )


def listed_features(features: str | Sequence[str]) -> list[str]:
    """The kinds of features of a call that takes one or several, checked."""
    listed = [features] if isinstance(features, str) else list(features)
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"`features` must be one or several of {FEATURES}, each once, got {features!r}.")
    for each in listed:
        check_choice(FEATURES, features=each)
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
