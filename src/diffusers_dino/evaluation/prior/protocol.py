"""A prior's tokens against those of held-out images: distance, a two-sample test, and copies of training tokens.

Everything is compared in the prior's standardised space, as one vector an image. Beside the prior stand the tokens of
training images, which are real, and a Gaussian of the training tokens' mean and covariance, which is the least that a
prior has to beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...metrics.bootstrap import share_interval
from ...metrics.copy_gate import search_features
from ...metrics.distances import frechet_of_samples
from ...metrics.neighbours import calibrate_threshold
from ...pipelines import DinoPriorPipeline
from ...prior import Condition
from ...seeds import generator_for
from ..results import JsonResult

__all__ = ["PriorResult", "TokenFigures", "evaluate_prior"]


@dataclass(frozen=True)
class TokenFigures:
    """What one kind of tokens has against the N held-out ones.

    Attributes:
        name: `"prior"`, `"gaussian"`, `"training"` or `"held out"`.
        num_sets: How many sets of N tokens the means are over.
        frechet: Mean Fréchet distance to the held-out tokens; None of themselves.
        frechet_low, frechet_high: The smallest and the largest of the sets.
        two_sample: Mean accuracy of a leave-one-out nearest-neighbour test that tells them from the held-out ones: 0.5
            cannot, 1 always can, and less than 0.5 means that they surround the held-out ones.
        two_sample_low, two_sample_high: The smallest and the largest of the sets.
        num_tokens: How many were searched for copies of training tokens.
        copies: Share of them that is nearer to a training token than the threshold.
        copies_low, copies_high: Interval of it (95 %, Wilson).
    """

    name: str
    num_sets: int
    frechet: float | None
    frechet_low: float | None
    frechet_high: float | None
    two_sample: float | None
    two_sample_low: float | None
    two_sample_high: float | None
    num_tokens: int
    copies: float
    copies_low: float
    copies_high: float


@dataclass(frozen=True)
class PriorResult(JsonResult):
    """All figures.

    Attributes:
        num_training, num_held_out: Numbers of real images.
        seed: Of the draws.
        num_inference_steps, guidance_scale: Of the sampling.
        threshold: Relative distance below which a token counts as a copy.
        false_alarms: Share of real images that the threshold may call copies.
        rows: Of each kind of tokens.
    """

    num_training: int
    num_held_out: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    threshold: float
    false_alarms: float
    rows: tuple[TokenFigures, ...]

    def row(self, name: str) -> TokenFigures:
        """The figures of one kind of tokens."""
        return next(row for row in self.rows if row.name == name)


def evaluate_prior(
    prior: DinoPriorPipeline,
    training: Tensor,
    held_out: Tensor,
    condition: Condition | None = None,
    *,
    num_sets: int = 8,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    false_alarms: float = 0.01,
) -> PriorResult:
    """Draw tokens from a prior, by its steps and guidance, and compare them with real ones.

    Args:
        training: Tokens `(M, S, D)` of the images that it was trained on.
        held_out: Tokens `(N, S, D)` of images that it was not trained on; `M >= 2 N`, or a ValueError says so.
        condition: What to ask for, of N images, such as what is known of the held-out ones; None asks for nothing.
        num_sets: Sets of N draws, over which figures are means.
        false_alarms: Share of real images that may be called copies.
    """
    count = len(held_out)
    if count < 2 or len(training) < 2 * count:
        raise ValueError(
            f"Give at least two held-out images and twice as many of training, got {count} and {len(training)}."
        )
    known, real = (prior.prior.standardise(tokens).flatten(1).cpu() for tokens in (training, held_out))
    own = range(len(known))
    threshold = calibrate_threshold(search_features(known, known, own, own).relative, false_alarms)

    def figures(name: str, sets: list[Tensor], compared: bool = True) -> TokenFigures:
        every = torch.cat(sets)
        copies = int((search_features(every, known).relative < threshold).sum())
        distances = [frechet_of_samples(drawn, real) for drawn in sets] if compared else []
        accuracies = [two_sample_accuracy(drawn, real) for drawn in sets] if compared else []
        return TokenFigures(
            name,
            len(sets),
            *_mean_and_ends(distances),
            *_mean_and_ends(accuracies),
            len(every),
            copies / len(every),
            *share_interval(copies, len(every)),
        )

    drawn = [
        prior.prior.standardise(
            prior(
                condition=prior.prior.conditions.unknown(count) if condition is None else condition,
                generator=[generator_for(seed, "evaluate prior", number, row) for row in range(count)],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).image_embeds
        )
        .flatten(1)
        .cpu()
        for number in range(num_sets)
    ]
    gaussian = list(_gaussian(known, count, num_sets, seed))
    order = torch.randperm(len(known), generator=generator_for(seed, "training sets"))
    training_sets = [known[rows] for rows in order.split(count) if len(rows) == count][:num_sets]
    # training tokens are their own copies: that says nothing
    no_copies = {"num_tokens": 0, "copies": 0.0, "copies_low": 0.0, "copies_high": 0.0}
    return PriorResult(
        len(known),
        count,
        seed,
        num_inference_steps,
        guidance_scale,
        threshold,
        false_alarms,
        (
            figures("prior", drawn),
            figures("gaussian", gaussian),
            replace(figures("training", training_sets), **no_copies),
            figures("held out", [real], compared=False),
        ),
    )


def two_sample_accuracy(first: Tensor, second: Tensor) -> float:
    """How often the nearest other one of both sets `(N, D)` is of the same set (Lopez-Paz & Oquab 2017, 1-NN)."""
    both = torch.cat([first, second]).double()
    labels = torch.arange(len(both)) < len(first)
    distances = torch.cdist(both, both).fill_diagonal_(torch.inf)
    return (labels[distances.argmin(1)] == labels).double().mean().item()


def _gaussian(known: Tensor, count: int, num_sets: int, seed: int) -> Iterator[Tensor]:
    """Draws of the Gaussian of a set of tokens: mean, and combinations of the centred tokens."""
    mean = known.mean(0)
    root = (known - mean) / (len(known) - 1) ** 0.5  # its Gram matrix over images is the covariance
    for number in range(num_sets):
        yield mean + torch.randn(count, len(known), generator=generator_for(seed, "gaussian", number)) @ root


def _mean_and_ends(values: list[float]) -> tuple[float | None, float | None, float | None]:
    return (float(np.mean(values)), min(values), max(values)) if values else (None, None, None)
