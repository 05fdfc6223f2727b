"""Zero-shot segmentation, scored: section 2.4 and Table 2 of the paper, without its optimism.

The segments of a model at all settings of a sweep come from `segment_sweep`. Two ways of choosing are reported:

- *best pair*: of each image the union of one or two segments with the largest Dice coefficient, which looks at the
  reference mask, as the paper does. Checkpoint, layers, timestep and threshold are chosen on half of the patients and
  scored on the other half, both ways, so no image is scored at settings that were chosen on it.
- *no ground truth*: segments and settings of each image are chosen by `diffusers_dino.selection` from the image alone.

Next to them stands what needs no diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.sources.masks import MaskedImages
from ...diffseg.lungs import lung_prior, most_agreed, name_lungs
from ...metrics.bootstrap import bootstrap_interval
from ...metrics.dice import best_union, dice, union_of
from ...seeds import generator_for
from ..results import JsonResult
from .baselines import kmeans_segments, mean_mask_of_others, otsu_mask
from .sweep import Setting, SweptSegments

__all__ = [
    "MethodScores",
    "SegmentationResult",
    "SweepScores",
    "chosen_masks",
    "cross_fit",
    "evaluate_segmentation",
    "split_in_halves",
]

BEST_PAIR, NO_GROUND_TRUTH, NOTHING = "best pair", "no ground truth", "nothing to choose"
_POSITION_WEIGHTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class MethodScores:
    """Dice coefficients of one method on N images.

    Attributes:
        method: Its name.
        selection: How segments were chosen.
        dice: Of each image, in [0, 1].
        mean: Of them.
        low, high: Bootstrap interval of the mean (95 %), over patients.
        median, lower_quartile, upper_quartile: Of them.
        chosen: The setting chosen on the first half and the one chosen on the second; empty if there was no choice.
        optimistic: The mean at the one setting that is best on all images; None if there was no choice.
    """

    method: str
    selection: str
    dice: tuple[float, ...]
    mean: float
    low: float
    high: float
    median: float
    lower_quartile: float
    upper_quartile: float
    chosen: tuple[str, ...] = ()
    optimistic: float | None = None


@dataclass(frozen=True)
class SweepScores:
    """The best pair's Dice coefficient of one model at each setting, for curves.

    Attributes:
        method: The model.
        settings: H of them.
        dice: H rows of N images.
        num_segments: H rows of N images.
    """

    method: str
    settings: tuple[Setting, ...]
    dice: tuple[tuple[float, ...], ...]
    num_segments: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SegmentationResult(JsonResult):
    """All figures of one data set.

    Attributes:
        dataset: Its name.
        keys: Of its N images.
        mask_size: Side in pixels that Dice coefficients are taken at.
        seed: Of the split in halves, the bootstrap and k-means.
        methods: Rows of the table.
        sweeps: One of each model.
    """

    dataset: str
    keys: tuple[str, ...]
    mask_size: int
    seed: int
    methods: tuple[MethodScores, ...]
    sweeps: tuple[SweepScores, ...]


def evaluate_segmentation(
    models: Mapping[str, Sequence[SweptSegments]],
    images: MaskedImages,
    *,
    dataset: str = "",
    seed: int = 0,
    progress: bool = True,
) -> SegmentationResult:
    """Score models that have been swept over a data set, beside the baselines.

    Args:
        models: The segments of each model, one entry for each of its checkpoints.
        images: The same images; now their masks are read.
        dataset: Name of the data set.
        seed: Of the split in halves, the bootstrap and k-means.
        progress: Whether to show a bar.

    Raises:
        ValueError: If there are not at least two patients, or a mask does not fit its image.
    """
    halves = split_in_halves(images.patients, seed)
    masks = torch.stack([images.mask(i) for i in range(len(images))])
    gray = _gray_images(images, range(len(images)))
    rows, sweeps = [], []

    def add(method: str, selection: str, scores: Tensor, settings: Sequence[object] = ()) -> Tensor | None:
        """Make a row of `(H, N)` scores; returns the setting chosen for each image, `(N,)`."""
        fitted = cross_fit(scores, halves)
        chosen = tuple(str(settings[i]) for i in fitted.settings) if settings else ()
        optimistic = scores.mean(dim=1).max().item() if settings else None
        rows.append(_summarize(method, selection, fitted.scores, images.patients, seed, chosen, optimistic))
        return fitted.indices

    for method, swept in models.items():
        found = _score_model(method, swept, masks, gray, progress)
        sweeps.append(found.sweep)
        oracle = torch.tensor(found.sweep.dice, dtype=torch.float64)
        indices = add(method, BEST_PAIR, oracle, found.sweep.settings)
        add(method, NO_GROUND_TRUTH, found.unsupervised[None])
        counts = torch.tensor(found.sweep.num_segments)[indices, torch.arange(len(images))]
        clusters = _score_kmeans(gray, masks, counts.tolist(), seed, progress)
        names = [f"position weight {weight:g}" for weight in _POSITION_WEIGHTS]
        add(f"k-means, as many segments as {method}", BEST_PAIR, clusters, names)
    constant = {
        "Otsu": torch.stack([otsu_mask(image) for image in gray]),
        "prior of `selection` alone": lung_prior(images.mask_size).expand_as(masks),
        "mean mask of other patients": mean_mask_of_others(masks, images.patients),
        "all ones": torch.ones_like(masks),
    }
    for method, prediction in constant.items():
        add(method, NOTHING, dice(prediction, masks)[None])
    return SegmentationResult(dataset, tuple(images.keys), images.mask_size, seed, tuple(rows), tuple(sweeps))


def chosen_masks(
    result: SegmentationResult,
    scores: MethodScores,
    swept: Sequence[SweptSegments],
    images: MaskedImages,
    indices: Sequence[int],
) -> list[Tensor]:
    """The masks behind a row of scores, for figures.

    Args:
        result: What `evaluate_segmentation` returned.
        scores: One of its rows, of a model.
        swept: The segments of that model.
        images: The images.
        indices: Which of them.

    Returns:
        A mask `(mask_size, mask_size)` bool for each index.
    """
    if scores.selection == NO_GROUND_TRUTH:
        gray = _gray_images(images, indices)
        return [
            _choose_unsupervised(_read_all(swept, index), image) for index, image in zip(indices, gray, strict=True)
        ]
    sweep = next(sweep for sweep in result.sweeps if sweep.method == scores.method)
    fitted = cross_fit(torch.tensor(sweep.dice), split_in_halves(images.patients, result.seed))
    masks = []
    for index in indices:
        segments = _read_all(swept, index)[fitted.indices[index]]
        masks.append(union_of(segments, best_union(segments, images.mask(index)).segments))
    return masks


def split_in_halves(patients: Sequence[str], seed: int = 0) -> Tensor:
    """Whether each image is in the first half of the patients: `(N,)` bool. A patient is in one half alone.

    Raises:
        ValueError: If there is only one patient.
    """
    names = sorted(set(patients))
    if len(names) < 2:
        raise ValueError(f"Choosing on one half and scoring on the other needs two patients, got {len(names)}.")
    order = torch.randperm(len(names), generator=generator_for(seed, "halves")).tolist()
    first = {names[i] for i in order[: len(names) // 2]}
    return torch.tensor([patient in first for patient in patients])


class CrossFit(NamedTuple):
    """Scores `(N,)` of images at a setting that was not chosen on them.

    Attributes:
        scores: `(N,)`.
        indices: `(N,)` int64, the setting of each image.
        settings: The setting chosen on the first half and the one chosen on the second.
    """

    scores: Tensor
    indices: Tensor
    settings: tuple[int, int]


def cross_fit(scores: Tensor, halves: Tensor) -> CrossFit:
    """Choose the setting with the best mean on one half of the images and score it on the other, both ways.

    Args:
        scores: `(H, N)`, of N images at H settings; higher is better.
        halves: `(N,)` bool, from `split_in_halves`.

    Raises:
        ValueError: If the shapes do not fit or a half is empty.
    """
    if scores.ndim != 2 or halves.shape != scores.shape[1:] or halves.all() or not halves.any():
        raise ValueError(
            f"Expected scores (H, N) and two halves of N images, got {tuple(scores.shape)}, {halves.tolist()}."
        )
    on_first, on_second = (int(scores[:, half].mean(dim=1).argmax()) for half in (halves, ~halves))
    indices = torch.where(halves, on_second, on_first)
    return CrossFit(scores.gather(0, indices[None])[0], indices, (on_first, on_second))


class _ModelScores(NamedTuple):
    sweep: SweepScores
    unsupervised: Tensor  # (N,)


def _score_model(
    method: str, swept: Sequence[SweptSegments], masks: Tensor, gray: Tensor, progress: bool
) -> _ModelScores:
    settings = [setting for one in swept for setting in one.settings]
    oracle, counts, unsupervised = [], [], []
    for i in tqdm(range(len(masks)), desc=f"{method}: scores", unit="image", disable=not progress):
        segments = _read_all(swept, i)
        oracle.append([best_union(candidate, masks[i]).dice for candidate in segments])
        counts.append([len(candidate.unique()) for candidate in segments])
        unsupervised.append(dice(_choose_unsupervised(segments, gray[i]), masks[i]).item())
    by_setting = (tuple(zip(*table, strict=True)) for table in (oracle, counts))
    return _ModelScores(
        SweepScores(method, tuple(settings), *by_setting), torch.tensor(unsupervised, dtype=torch.float64)
    )


def _choose_unsupervised(segments: Tensor, gray: Tensor) -> Tensor:
    """The mask `(S, S)` bool that is taken for the lungs, of segments `(H, S, S)` at all settings."""
    named = torch.stack([name_lungs(candidate, gray).mask for candidate in segments])
    return named[most_agreed(named)]


def _score_kmeans(gray: Tensor, masks: Tensor, counts: list[int], seed: int, progress: bool) -> Tensor:
    """Best pair's Dice `(position weights, N)` of k-means with the given number of segments for each image."""
    rows = []
    for weight in tqdm(_POSITION_WEIGHTS, desc="k-means", unit="weight", disable=not progress):
        segments = (kmeans_segments(g, k, weight, seed=seed) for g, k in zip(gray, counts, strict=True))
        rows.append([best_union(s, mask).dice for s, mask in zip(segments, masks, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def _read_all(swept: Sequence[SweptSegments], index: int) -> Tensor:
    """Segments `(H, S, S)` of one image, of all checkpoints."""
    return torch.cat([one.read(index) for one in swept])


def _gray_images(images: MaskedImages, indices: Sequence[int]) -> Tensor:
    """Images in gray at the size of the masks: `(N, mask_size, mask_size)` in [0, 1]."""
    shown = images.resized(images.mask_size)
    return torch.stack([shown.image(i).mean(dim=0) for i in indices])


def _summarize(
    method: str,
    selection: str,
    scores: Tensor,
    patients: Sequence[str],
    seed: int,
    chosen: tuple[str, ...],
    optimistic: float | None,
) -> MethodScores:
    low, high = bootstrap_interval(lambda rows: scores[rows].mean(), len(scores), patients, repeats=10_000, seed=seed)
    quartiles = scores.quantile(torch.tensor([0.5, 0.25, 0.75], dtype=scores.dtype)).tolist()
    figures = tuple(scores.tolist()), scores.mean().item(), low, high, *quartiles
    return MethodScores(method, selection, *figures, chosen, optimistic)
