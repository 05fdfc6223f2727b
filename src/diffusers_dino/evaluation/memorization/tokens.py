"""The same search among condition tokens: a prior can copy those of training images, and its images then vary them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from ...embeddings import token_statistics
from ...metrics.copy_gate import search_features
from ...metrics.neighbours import Groups, calibrate_threshold, evenly_spread
from ...seeds import generator_for
from .sets import PlantedFigures, SetFigures, check_calibration, find_planted, summarize

__all__ = ["PLANTED_TOKENS", "TokenCopies", "compare_tokens"]


@dataclass(frozen=True)
class TokenCopies:
    """How near tokens are to those of training images; attributes are as in `MemorizationResult`, of tokens.

    Attributes:
        num_tokens, token_dim: S and D.
        drawn: Whether the synthetic tokens are those that a prior drew, not those of synthetic images.
    """

    num_tokens: int
    token_dim: int
    drawn: bool
    threshold: float
    training: SetFigures
    held_out: SetFigures | None
    synthetic: SetFigures | None
    planted: tuple[PlantedFigures, ...]


def compare_tokens(
    training: Tensor,
    synthetic: Tensor | None = None,
    held_out: Tensor | None = None,
    *,
    drawn: bool = False,
    training_groups: Groups | None = None,
    held_out_groups: Groups | None = None,
    false_alarms: float = 0.01,
    calibrate_on: Literal["training", "held out"] = "training",
) -> TokenCopies:
    """Which share of tokens is nearer to a training token than real tokens are?

    Tokens are standardised by the training tokens and compared as one vector an image, by the relative distance and
    with the threshold of the search among images. Those of a variation are *meant* to be near its source: compare what
    a prior drew, or images of sources that were not trained on.

    Args:
        training: Tokens `(M, S, D)` of what the model was trained on.
        synthetic: `(N, S, D)`, drawn by a prior or of synthetic images.
        held_out: `(H, S, D)` of real images that it was not trained on.
        drawn: Whether a prior drew the synthetic ones, for the record.
        training_groups, held_out_groups, false_alarms, calibrate_on: As in `evaluate_memorization`.

    ValueError if shapes or groups do not fit, a token is not finite, or there are too few to calibrate on.
    """
    check_calibration(held_out, calibrate_on, training_groups, held_out_groups)
    sets = {"training": training, "synthetic": synthetic, "held_out": held_out}
    for name, tokens in sets.items():
        if tokens is not None and (tokens.ndim != 3 or tokens.shape[1:] != training.shape[1:]):
            raise ValueError(
                f"Expected {name} tokens (N, {', '.join(map(str, training.shape[1:]))}), got {tuple(tokens.shape)}."
            )
    mean, std = token_statistics(training)
    rows = {name: None if tokens is None else ((tokens - mean) / std).flatten(1) for name, tokens in sets.items()}
    known = rows["training"]
    own: Groups = range(len(known)) if training_groups is None else training_groups
    found = {"training": search_features(known, known, own, own), "held_out": None, "synthetic": None}
    if held_out is not None:
        theirs = None if held_out_groups is None else own
        found["held_out"] = search_features(rows["held_out"], known, held_out_groups, theirs)
    if synthetic is not None:
        found["synthetic"] = search_features(rows["synthetic"], known)
    threshold = calibrate_threshold(found[calibrate_on.replace(" ", "_")].relative, false_alarms)
    spacing = found["training"].neighbors.distance
    return TokenCopies(
        num_tokens=training.shape[1],
        token_dim=training.shape[2],
        drawn=drawn,
        threshold=threshold,
        planted=_plant(known, threshold),
        **{name: None if near is None else summarize(near, threshold, spacing) for name, near in found.items()},
    )


def _noisy(tokens: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(tokens.shape, dtype=tokens.dtype, generator=generator_for("planted tokens"))
    return tokens + deviation * noise


# Standardised tokens `(N, S * D)` to copies of them, by what was done.
PLANTED_TOKENS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "exact": lambda tokens: tokens,
        "noise of 10 % of the spread": lambda tokens: _noisy(tokens, 0.1),
        "noise of 30 % of the spread": lambda tokens: _noisy(tokens, 0.3),
        "a tenth of the way to another image": lambda tokens: tokens.lerp(tokens.roll(1, 0), 0.1),
        "half of the way to another image": lambda tokens: tokens.lerp(tokens.roll(1, 0), 0.5),
    }
)


def _plant(known: Tensor, threshold: float, count: int = 200) -> tuple[PlantedFigures, ...]:
    """Change training tokens, evenly spread over their order, and search for them."""
    chosen = known[evenly_spread(len(known), count)]
    return find_planted(PLANTED_TOKENS, chosen, lambda copies: search_features(copies, known).relative, threshold)
