"""Figures of one set of images or tokens: how near it is to the training set, and what is found of planted copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...metrics.bootstrap import share_interval
from ...metrics.copy_gate import Distances
from ...metrics.neighbours import Groups, authenticity
from ...pipelines.checks import check_choice

__all__ = ["NUM_BINS", "PlantedFigures", "SetFigures", "check_calibration", "find_planted", "summarize"]

NUM_BINS = 50


@dataclass(frozen=True)
class SetFigures:
    """How near the images of one set are to the training images.

    Attributes:
        copies: How many are nearer than the threshold.
        share, low, high: The same as a share, with its interval (95 %, Wilson; as if the images were independent).
        authentic: Share that is farther from its nearest training image than that is from its own nearest (AuthPct).
        authentic_low, authentic_high: Interval of it.
        nearest, median: The smallest and the middle relative distance.
        histogram: Images by relative distance, in `NUM_BINS` equal bins of [0, 1].
    """

    num_images: int
    copies: int
    share: float
    low: float
    high: float
    authentic: float
    authentic_low: float
    authentic_high: float
    nearest: float
    median: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class PlantedFigures:
    """What share of copies of training images is found after a `change` that was made to them."""

    change: str
    num_images: int
    found: float


def check_calibration(
    held_out: object | None, calibrate_on: str, training_groups: Groups | None, held_out_groups: Groups | None
) -> None:
    """ValueError unless what the threshold is learned from, and what groups belong to, is there."""
    check_choice(("training", "held out"), calibrate_on=calibrate_on)
    if held_out is None and (calibrate_on == "held out" or held_out_groups is not None):
        raise ValueError("There are no held-out images to calibrate on, or to have groups: give them as `held_out`.")
    if held_out_groups is not None and training_groups is None:
        raise ValueError(
            "Groups of held-out images are compared with those of training images: give `training_groups`."
        )


def summarize(found: Distances, threshold: float, spacing: Tensor) -> SetFigures:
    """Figures of N images; `spacing` `(M,)` is how far each training image is from the nearest other one."""
    nearest = found.smallest
    n, copies = len(nearest), int((nearest < threshold).sum())
    authentic = int(authenticity(found.neighbors, spacing).sum())
    return SetFigures(
        n,
        copies,
        copies / n,
        *share_interval(copies, n),
        authentic / n,
        *share_interval(authentic, n),
        nearest.min().item(),
        nearest.median().item(),
        tuple(torch.histc(nearest, NUM_BINS, 0, 1).long().tolist()),
    )


def find_planted(
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    originals: Tensor,
    distances_of: Callable[[Tensor], Tensor],
    threshold: float,
) -> tuple[PlantedFigures, ...]:
    """Change images or tokens in each way, and find those whose distances `(N,)` are below the threshold."""
    found = {change: distances_of(make(originals)) < threshold for change, make in changes.items()}
    return tuple(PlantedFigures(name, len(originals), hits.double().mean().item()) for name, hits in found.items())
