"""Zero-shot segmentation, scored: section 2.4 and Table 2 of the paper, without its optimism.

The segments of a model at all settings come from `segments.segment_images`. Two ways of choosing are reported:

- *best pair*: of each image the union of one or two segments with the largest Dice coefficient, which looks at the
  reference mask, as the paper does. Checkpoint, layers, timestep and threshold are chosen on half of the patients and
  scored on the other half, both ways, so no image is scored at settings that were chosen on it.
- *no ground truth*: segments and settings of each image are chosen by `diffseg.lungs` from the image only.

Next to them stands what needs no diffusion model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ...data.images.errors import UnreadableImageError
from ...data.sources.masks import MaskedImages
from ...diffseg.lungs import lung_prior, most_agreed, name_lungs
from ...diffseg.settings import noted_settings
from ...files import lock_folder, make_writable_folder
from ...metrics.bootstrap import bootstrap_interval
from ...metrics.dice import best_union, dice, union_of
from ...pipelines import DiffSegPipeline
from ...pixels import with_channels
from ..controls import split_in_halves, with_fresh_unet
from ..generation import Model, models_of
from ..results import JsonResult
from .baselines import kmeans_segments, mean_mask_of_others, otsu_mask
from .segments import SweptSegments, segment_images
from .sweep import Setting, Sweep

__all__ = [
    "MethodScores",
    "SegmentationResult",
    "SegmentationStudy",
    "SweepScores",
    "chosen_masks",
    "cross_fit",
    "evaluate_segmentation",
    "file_name",
    "score_segments",
]

logger = logging.getLogger(__name__)

BEST_PAIR, NO_GROUND_TRUTH, NOTHING = "best pair", "no ground truth", "nothing to choose"
_POSITION_WEIGHTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class MethodScores:
    """Dice coefficients of one method on N images.

    Attributes:
        selection: How segments were chosen.
        dice: Of each image, in [0, 1].
        low, high: Bootstrap interval of the mean (95 %), over patients.
        chosen: The setting chosen on the first half and the one chosen on the second; empty if there was no choice.
        optimistic: The mean at the one setting that is best on all images; None if there was no choice.
        seconds: That segmenting an image took; None if that is not known. Fitting clusters is part of it.
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
    seconds: float | None = None


@dataclass(frozen=True)
class SweepScores:
    """The best pair's Dice coefficient of one model at each of H settings, for curves: H rows of N images."""

    method: str
    settings: tuple[Setting, ...]
    dice: tuple[tuple[float, ...], ...]
    num_segments: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SegmentationResult(JsonResult):
    """All figures of one data set.

    Attributes:
        keys: Of its N images.
        mask_size: Side in pixels that Dice coefficients are taken at.
        seed: Of the split in halves, the bootstrap and k-means.
        methods: Rows of the table.
        sweeps: One of each model.
        patients_known: Whether the halves are of patients; else they are of images.
    """

    dataset: str
    keys: tuple[str, ...]
    mask_size: int
    seed: int
    methods: tuple[MethodScores, ...]
    sweeps: tuple[SweepScores, ...]
    patients_known: bool = True


class SegmentationStudy(NamedTuple):
    """Figures, and the segments of each model behind them, one entry for each of its checkpoints."""

    result: SegmentationResult
    swept: dict[str, list[SweptSegments]]


def evaluate_segmentation(
    models: DiffusionPipeline | Iterable[Model],
    images: MaskedImages,
    folder: str | Path,
    sweep: Sweep | Sequence[Sweep] | None = None,
    *,
    dataset: str = "",
    untrained: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> SegmentationStudy:
    """Segment a data set with each model at all settings of a sweep, and score the segments beside the baselines.

    A model that settings were noted with (`diffseg.note_settings`) is also scored at these, in a row of its own.

    Args:
        models: A pipeline of this package or a Stable Diffusion (with the empty prompt), or several models; those of
            one name are checkpoints of one model. An iterator may load one after the other.
        images: Images with masks; masks are read only once all segments are made. Images that cannot be read are left
            out: the result's keys are those of the others.
        folder: Where segments are kept: another call with it computes only what is missing.
        sweep: The settings; several, of different methods, give rows of their own. Those that read a denoiser are left
            out for a pipeline that has none.
        dataset: Name of the data set.
        untrained: Whether to sweep the UNet before training, too, for each model of this package.
        seed: Of the split in halves, the bootstrap and k-means.

    Raises:
        ValueError: If there are not at least two patients, more than 5 % of the images cannot be read, a mask does not
            fit its image, all masks are empty, or `folder` was begun with another model, other images or settings.
        RuntimeError: If another process is at work in the folder.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    images = _readable(images)
    if not images.patients_known:
        logger.warning("Patients are not known: images of one patient may be in both halves.")
    split_in_halves(images.patients, seed)  # says at once if there is one patient only
    sweeps = _listed(sweep)
    swept: dict[str, list[SweptSegments]] = {}

    def add(name: str, pipe: DiffSegPipeline, sweeps: Sequence[Sweep], checkpoint: str = "") -> None:
        for each in sweeps:
            row = ", ".join(filter(None, (name, each.title)))
            logger.info("%s: %s", ", ".join(filter(None, (dataset, row))), checkpoint or "all settings")
            place = Path(folder) / file_name(row) / (file_name(checkpoint) or "model")
            options = {"checkpoint": checkpoint, "chunk": batch_size, "progress": progress}
            swept.setdefault(row, []).append(segment_images(pipe, images, each, place, **options))

    met: set[str] = set()
    with lock_folder(make_writable_folder(folder)):
        for model in models_of(models):
            is_diffseg = isinstance(model.pipe, DiffSegPipeline)  # which may be without a denoiser
            pipe = model.pipe if is_diffseg else DiffSegPipeline.from_pipe(model.pipe)
            of_denoiser = [each for each in sweeps if each.reads_denoiser]
            if pipe.denoiser is None:
                add(model.name, pipe, [each for each in sweeps if not each.reads_denoiser])
                continue
            add(model.name, pipe, sweeps, model.checkpoint)
            if (noted := noted_settings(pipe.denoiser.config)) is not None:
                at_noted = [each.at(noted) for each in sweeps if each.method == "diffseg"]
                add(f"{model.name}, settings noted with it", pipe, at_noted, model.checkpoint)
            if untrained and model.name not in met and pipe.conditioner is not None:
                add(f"{model.name}, untrained", with_fresh_unet(pipe), of_denoiser)
            met.add(model.name)
    if not swept:
        raise ValueError("None of the models has a denoiser, and every sweep reads one: sweep the encoder's features.")
    return SegmentationStudy(score_segments(swept, images, dataset=dataset, seed=seed, progress=progress), swept)


def _listed(sweep: Sweep | Sequence[Sweep] | None) -> list[Sweep]:
    """One sweep or several, whose rows have different names."""
    sweeps = [sweep or Sweep()] if sweep is None or isinstance(sweep, Sweep) else list(sweep)
    titles = [each.title for each in sweeps]
    if not titles or len(set(titles)) < len(titles):
        raise ValueError(f"Give one sweep, or several of different methods or features, got {titles}.")
    return sweeps


def _readable(images: MaskedImages) -> MaskedImages:
    """Those of the images that can be read."""
    lost = []
    for index, key in enumerate(images.keys):
        try:
            images.image(index)
        except UnreadableImageError as error:
            logger.warning("%s. Left out.", error)
            lost.append(key)
    if not lost:
        return images
    if len(lost) > 0.05 * len(images):
        raise ValueError(
            f"{len(lost)} of {len(images)} images cannot be read, such as {lost[0]}: mend or remove them."
        )
    return images.select([key for key in images.keys if key not in lost])


def file_name(name: str) -> str:
    """A name of a model or data set as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name)


def score_segments(
    models: Mapping[str, Sequence[SweptSegments]],
    images: MaskedImages,
    *,
    dataset: str = "",
    seed: int = 0,
    progress: bool = True,
) -> SegmentationResult:
    """The second half of `evaluate_segmentation`: score models that have been swept; now masks are read.

    `models` are the segments of each, one entry for each of its checkpoints.
    """
    halves = split_in_halves(images.patients, seed)
    masks = torch.stack([images.mask(i) for i in range(len(images))])
    empty = int((~masks.flatten(1).any(dim=1)).sum())
    if empty == len(masks):
        raise ValueError(f"All {empty} masks {dataset and f'of {dataset} '}are empty: there is nothing to find.")
    if empty:
        logger.warning("%d of %d masks are empty: only an empty prediction agrees with them.", empty, len(masks))
    gray = _gray_images(images, range(len(images)))
    rows, sweeps = [], []

    def add(
        method: str, selection: str, scores: Tensor, settings: Sequence[object] = (), seconds: float | None = None
    ) -> Tensor | None:
        """Make a row of `(H, N)` scores; returns the setting chosen for each image, `(N,)`."""
        fitted = cross_fit(scores, halves)
        own = fitted.scores
        low, high = bootstrap_interval(lambda i: own[i].mean(), len(own), images.patients, repeats=10_000, seed=seed)
        quartiles = own.quantile(torch.tensor([0.5, 0.25, 0.75], dtype=own.dtype)).tolist()
        chosen = tuple(str(settings[i]) for i in fitted.settings) if settings else ()
        optimistic = scores.mean(dim=1).max().item() if settings else None
        figures = (tuple(own.tolist()), own.mean().item(), low, high, *quartiles)
        rows.append(MethodScores(method, selection, *figures, chosen, optimistic, seconds))
        return fitted.indices

    for method, swept in models.items():
        sweep, unsupervised = _score_model(method, swept, masks, gray, progress)
        sweeps.append(sweep)
        seconds, of_all = ([getattr(one, name) for one in swept] for name in ("seconds", "seconds_of_all"))
        scored = torch.tensor(sweep.dice, dtype=torch.float64)
        mean = None if None in seconds else sum(seconds) / len(seconds)
        indices = add(method, BEST_PAIR, scored, sweep.settings, mean)
        # all settings are made: they agree on the lungs
        add(method, NO_GROUND_TRUTH, unsupervised[None], seconds=None if None in of_all else sum(of_all))
        counts = torch.tensor(sweep.num_segments)[indices, torch.arange(len(images))]
        clusters = _score_kmeans(gray, masks, counts.tolist(), seed, progress)
        names = [f"position weight {weight:g}" for weight in _POSITION_WEIGHTS]
        add(f"k-means, as many segments as {method}", BEST_PAIR, clusters, names)
    constant = {
        "Otsu": torch.stack([otsu_mask(image) for image in gray]),
        "two ellipses, where lungs are named": lung_prior(images.mask_size).expand_as(masks),
        "mean mask of other patients": mean_mask_of_others(masks, images.patients),
        "all ones": torch.ones_like(masks),
    }
    for method, prediction in constant.items():
        add(method, NOTHING, dice(prediction, masks)[None])
    facts = (dataset, tuple(images.keys), images.mask_size, seed, tuple(rows), tuple(sweeps))
    return SegmentationResult(*facts, images.patients_known)


def chosen_masks(
    study: SegmentationStudy, scores: MethodScores, images: MaskedImages, indices: Sequence[int]
) -> list[Tensor]:
    """The masks `(mask_size, mask_size)` bool behind a row of scores of a model, of the images with these numbers.

    Numbers are those of the result's keys.
    """
    images, swept = images.select(study.result.keys), study.swept[scores.method]
    if scores.selection == NO_GROUND_TRUTH:
        gray = _gray_images(images, indices)
        return [_choose_unsupervised(swept, i, image) for i, image in zip(indices, gray, strict=True)]
    sweep = next(sweep for sweep in study.result.sweeps if sweep.method == scores.method)
    fitted = cross_fit(
        torch.tensor(sweep.dice, dtype=torch.float64), split_in_halves(images.patients, study.result.seed)
    )
    masks = []
    for index in indices:
        segments = _read_all(swept, index)[fitted.indices[index]]
        masks.append(union_of(segments, best_union(segments, images.mask(index)).segments))
    return masks


class CrossFit(NamedTuple):
    """Scores `(N,)` at settings `(N,)` that were not chosen on the same images, and those chosen on either half."""

    scores: Tensor
    indices: Tensor
    settings: tuple[int, int]


def cross_fit(scores: Tensor, halves: Tensor) -> CrossFit:
    """Choose the setting with the best mean on one half of the images and score it on the other, both ways.

    `scores` are `(H, N)`, of N images at H settings, and higher is better; `halves` `(N,)` are from `split_in_halves`.
    """
    if scores.ndim != 2 or halves.shape != scores.shape[1:] or halves.all() or not halves.any():
        raise ValueError(
            f"Expected scores (H, N) and two halves of N images, got {tuple(scores.shape)}, {halves.tolist()}."
        )
    on_first, on_second = (int(scores[:, half].mean(dim=1).argmax()) for half in (halves, ~halves))
    indices = torch.where(halves, on_second, on_first)
    return CrossFit(scores.gather(0, indices[None])[0], indices, (on_first, on_second))


def _score_model(
    method: str, swept: Sequence[SweptSegments], masks: Tensor, gray: Tensor, progress: bool
) -> tuple[SweepScores, Tensor]:
    """Scores of the best pair at each setting, and of what is chosen without masks `(N,)`."""
    settings = [setting for one in swept for setting in one.settings]
    oracle, counts, unsupervised = [], [], []
    for i in tqdm(range(len(masks)), desc=f"{method}: scores", unit="image", disable=not progress):
        segments = _read_all(swept, i)
        oracle.append([best_union(candidate, masks[i]).dice for candidate in segments])
        counts.append([len(candidate.unique()) for candidate in segments])
        unsupervised.append(dice(_choose_unsupervised(swept, i, gray[i]), masks[i]).item())
    by_setting = (tuple(zip(*table, strict=True)) for table in (oracle, counts))
    return SweepScores(method, tuple(settings), *by_setting), torch.tensor(unsupervised, dtype=torch.float64)


def _choose_unsupervised(swept: Sequence[SweptSegments], index: int, gray: Tensor) -> Tensor:
    """The mask `(S, S)` bool that is taken for the lungs of an image, of its segments at all settings."""
    clustered = [lungs for one in swept if (lungs := one.read_lungs(index)) is not None]
    if clustered:
        named = torch.cat(clustered)
    else:
        named = torch.stack([name_lungs(candidate, gray).mask for candidate in _read_all(swept, index)])
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
    return torch.stack([with_channels(shown.image(i), 1)[0] for i in indices])
