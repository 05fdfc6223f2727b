"""Can it be told from a model which images it was trained on? An attack on the model, with a control.

A model denoises what it was trained on better than what it has not seen. The attack noises an image's latents to a
timestep, has the model denoise them under the image's own condition, and takes a small error for a sign of membership
(Matsumoto et al. 2023, arXiv 2302.03262; Carlini et al. 2023, arXiv 2301.13188). It is made on images whose
membership is known: 0.5 says that it tells nothing, 1 that it tells all. The control is a blind guess that never asks
the model: a linear classifier of the sets on coarse pixels, tested on patients that it was not fitted on. Where it
tells the sets apart, they differ by themselves, and the attack may have found only that (Das et al. 2024, arXiv
2406.16201).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm import tqdm

from ...data import ImageDataset
from ...denoisers import family_of
from ...fusion import fuse
from ...latents import encode_to_moments
from ...metrics import pixel_features
from ...metrics.auroc import auroc_draws, draw_weights, stratified_auroc
from ...metrics.bootstrap import percentile_interval
from ...pixels import unit_to_uint8, unit_to_vae
from ...schedules import add_noise, embed_guidance, is_flow
from ...seeds import generator_for
from ...training.objective import prediction_target
from ..controls import rows_in
from ..folds import assign_folds
from ..generation import stack_readable
from ..results import JsonResult

if TYPE_CHECKING:
    from ...pipelines import DinoDiffusionPipeline

__all__ = ["AttackFigures", "MembershipResult", "denoising_errors", "evaluate_membership"]

logger = logging.getLogger(__name__)

Images = ImageDataset | Tensor

_FALSE_ALARMS = 0.01
_FOLDS = 5


@dataclass(frozen=True)
class AttackFigures:
    """How well the attack tells training images from others, at one timestep or by all of them.

    Attributes:
        timestep: None for all timesteps taken together: the mean of standardised errors.
        auroc, low, high: Chance that a training image has the smaller error, with a 95 % interval over patients.
        found: Share of the training images that are found where 1 % of the others are taken for ones.
    """

    timestep: int | None
    auroc: float
    low: float
    high: float
    found: float


@dataclass(frozen=True)
class MembershipResult(JsonResult):
    """All figures of one model.

    Attributes:
        num_training, num_held_out: Images of either set, without those that cannot be read.
        num_noises: Draws of noise at each timestep, whose errors are averaged.
        seed, repeats: Of noise and bootstrap; draws of the latter.
        by_patient: Whether patients were drawn, not images.
        attacks: At each timestep.
        combined: By all timesteps.
        blind, blind_low, blind_high: AUROC of the blind guess, likewise.
    """

    num_training: int
    num_held_out: int
    num_noises: int
    seed: int
    repeats: int
    by_patient: bool
    attacks: tuple[AttackFigures, ...]
    combined: AttackFigures
    blind: float
    blind_low: float
    blind_high: float

    @property
    def is_comparable(self) -> bool:
        """Whether the sets are alike to a blind guess: the interval of its AUROC does not lie above 0.5."""
        return self.blind_low <= 0.5

    @property
    def leaks(self) -> bool:
        """Whether the model tells more than chance and than the blind guess: the whole interval lies above both."""
        return self.combined.low > max(0.5, self.blind)


def evaluate_membership(
    pipe: DinoDiffusionPipeline,
    training: Images,
    held_out: Images,
    *,
    timesteps: Sequence[int] = (50, 100, 200, 400),
    num_noises: int = 4,
    training_groups: Sequence[Hashable] | None = None,
    held_out_groups: Sequence[Hashable] | None = None,
    bootstrap_repeats: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> MembershipResult:
    """Try to tell training images from held-out ones by how well a model denoises them.

    Args:
        pipe: The model.
        training: Images that it was trained on, prepared as in training: a data set, or `(M, C, H, W)` in [0, 1].
        held_out: Images of other patients from the same source, likewise: `(N, C, H, W)`. A difference between the
            sources would be taken for membership; the blind guess shows it.
        timesteps: Of the noise, ascending, below the schedule's number of timesteps.
        num_noises: Draws of noise at each of them.
        training_groups, held_out_groups: The patient of each image, both or none: the bootstrap draws them whole.
        seed: Of noise and bootstrap. The noise of an image depends on the seed, its set and its key or number.

    ValueError if images are in both sets, there are fewer than two in one, groups do not fit, or timesteps do not
    ascend or are out of range.
    """
    if (training_groups is None) != (held_out_groups is None):
        raise ValueError("Give the groups of both sets, or of none.")
    if num_noises < 1 or batch_size < 1:
        raise ValueError(f"num_noises and batch_size must be at least 1, got {num_noises} and {batch_size}.")
    sets = {"training": (training, training_groups), "held out": (held_out, held_out_groups)}
    stacked, names, groups = {}, {}, []
    for name, (images, own) in sets.items():
        stacked[name], rows, names[name] = stack_readable(images)
        if own is not None and len(own) != len(images):
            raise ValueError(f"Give one group an image: {len(own)} groups for {len(images)} {name} images.")
        if len(rows) < 2:
            raise ValueError(f"The attack needs two images or more of either set, got {len(rows)} {name} ones.")
        groups += [own[row] for row in rows] if own is not None else [f"{name} {row}" for row in rows]
    sizes = [len(images) for images in stacked.values()]
    if shared := int(rows_in(*(unit_to_uint8(stacked[name].mean(dim=1)) for name in ("held out", "training"))).sum()):
        raise ValueError(f"{shared} of the {sizes[1]} held-out images are training images: leave them out.")
    if training_groups is not None and (both := set(groups[: sizes[0]]) & set(groups[sizes[0] :])):
        logger.warning("%d patients have images in both sets: the held-out ones are then not quite unseen.", len(both))

    draws = {"timesteps": timesteps, "num_noises": num_noises, "batch_size": batch_size, "seed": seed}
    errors = [
        denoising_errors(pipe, images, [f"{name} {key}" for key in names[name]], progress=progress, **draws)
        for name, images in stacked.items()
    ]
    scores = _scores(torch.cat(errors).numpy())  # (M + N, T + 1)
    members = np.arange(sum(sizes)) < sizes[0]
    targets = np.repeat(members[:, None], scores.shape[1], axis=1)
    weights = draw_weights(groups, (~members).astype(int), bootstrap_repeats, seed)
    auroc, drawn = auroc_draws(scores, targets)[0], auroc_draws(scores, targets, weights)
    bounds = np.quantile(scores[~members], 1 - _FALSE_ALARMS, axis=0, method="higher")
    found = (scores[members] > bounds).mean(axis=0)
    attacks = [
        AttackFigures(timestep, float(auroc[i]), *percentile_interval(drawn[:, i]), float(found[i]))
        for i, timestep in enumerate([*timesteps, None])
    ]
    features = torch.cat([pixel_features(images) for images in stacked.values()]).double().numpy()
    guess, folds = _guess_blindly(features, members, groups, seed)
    blind, blind_draws = (stratified_auroc(guess, targets[:, :1], folds, drawn) for drawn in (None, weights))
    result = MembershipResult(
        *sizes,
        num_noises,
        seed,
        bootstrap_repeats,
        training_groups is not None,
        tuple(attacks[:-1]),
        attacks[-1],
        blind.item(),
        *percentile_interval(blind_draws[:, 0]),
    )
    if not result.is_comparable:
        logger.warning("The sets differ by themselves: a blind guess tells them apart. Take images of one source.")
    return result


@torch.no_grad()
def denoising_errors(
    pipe: DinoDiffusionPipeline,
    images: Tensor,
    keys: Sequence[str],
    *,
    timesteps: Sequence[int],
    num_noises: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Mean squared error of the UNet's prediction at each timestep, under an image's own condition: `(N, T)` float64.

    Images are `(N, C, H, W)` in [0, 1]. The noise of an image depends only on the seed, its key, the timestep and the
    number of the draw. ValueError as of `evaluate_membership`, or if an error is not finite.
    """
    scheduler = pipe.scheduler if is_flow(pipe.scheduler) else DDPMScheduler.from_config(pipe.scheduler.config)
    last = scheduler.config["num_train_timesteps"]
    if not timesteps or list(timesteps) != sorted(set(timesteps)) or timesteps[0] < 0 or timesteps[-1] >= last:
        raise ValueError(f"timesteps are ascending numbers from 0 to {last - 1}, got {list(timesteps)}.")
    if len(keys) != len(images):
        raise ValueError(f"Give one key an image: {len(keys)} keys for {len(images)} images.")
    device, dtype = pipe.denoiser.device, pipe.denoiser.dtype
    rows = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc="errors", unit="batch", leave=False, disable=not progress):
        batch, names = images[start : start + batch_size].to(device), keys[start : start + batch_size]
        pixels = unit_to_vae(batch, pipe.vae.config["in_channels"]).to(pipe.vae.dtype)
        latents = encode_to_moments(pipe.vae, pixels)[0].to(dtype)
        tokens = fuse(pipe.fusion, pipe.encode_image(batch).to(dtype))
        width = pipe.denoiser.config.get("time_cond_proj_dim")  # a distilled one is told of guidance: 1 is none
        guidance = None if width is None else embed_guidance(torch.ones(len(batch)), width).to(latents)
        columns = []
        for timestep in timesteps:
            t, errors = torch.full((len(batch),), timestep, device=device), []
            for draw in range(num_noises):
                generators = [generator_for(seed, "membership", name, timestep, draw) for name in names]
                noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
                noisy = add_noise(scheduler, latents, noise, t)
                predicted = family_of(pipe.denoiser).predict(pipe.denoiser, noisy, t, tokens, guidance)
                target = prediction_target(scheduler, latents, noise, t)
                errors.append((predicted.double() - target.double()).square().mean(dim=(1, 2, 3)).cpu())
            columns.append(torch.stack(errors).mean(dim=0))
        rows.append(torch.stack(columns, dim=1))
    found = torch.cat(rows)
    if not found.isfinite().all():
        raise ValueError("The model's predictions are not finite: it is not usable, or its type overflows.")
    return found


def _scores(errors: np.ndarray) -> np.ndarray:
    """Errors `(N, T)` to scores `(N, T + 1)`, higher for likely members; the last is of all timesteps."""
    spread = errors.std(axis=0)
    standard = (errors - errors.mean(axis=0)) / np.where(spread > 0, spread, 1)
    return -np.column_stack([standard, standard.mean(axis=1)])


def _guess_blindly(
    features: np.ndarray, members: np.ndarray, groups: Sequence[Hashable], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores `(N, 1)` of a ridge regression of membership on features `(N, D)`, fitted without an image's fold `(N,)`.

    Folds keep patients whole.
    """
    patients = [str(group) for group in groups]
    fewest = min(len({p for p, own in zip(patients, members, strict=True) if own == side}) for side in (True, False))
    folds = assign_folds(members[:, None], patients, min(_FOLDS, max(2, fewest)), seed)
    guess = np.zeros(len(members))
    for fold in np.unique(folds):
        fitted = folds != fold
        center, target = features[fitted].mean(axis=0), members[fitted] - members[fitted].mean()
        known, unknown = features[fitted] - center, features[~fitted] - center
        products = known @ known.T
        ridge = max(np.trace(products) / len(products), 1e-12) * np.eye(len(products))
        guess[~fitted] = unknown @ known.T @ np.linalg.solve(products + ridge, target)
    return guess[:, None], folds
