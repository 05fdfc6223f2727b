"""How far generated images are from real ones: the paper's Fig. 3, with the controls that give its numbers a scale.

Sources and reference are images of different patients. The rows that stand beside each other have one reference and
one number of images:

- *generated*: an image generated from each source, by a model or by each checkpoint of its training;
- *untrained*: the same by the model's UNet before training;
- *real*: the sources themselves, which is what a perfect model would reach.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...files import save_atomically, work_folder, write_json
from ...fingerprints import fingerprint_pipeline, hash_of, own_config
from ...metrics import FeatureExtractor, FeatureSet, FeatureSpec, extract_features, open_extractor
from ...metrics.bootstrap import (
    LEVEL,
    Bootstrap,
    estimate_frechet,
    estimate_kernel,
    estimate_manifolds,
    estimate_vendi,
)
from ..controls import with_fresh_unet
from ..generation import Model, embed_images, generate_batches, models_of
from .result import REAL, UNTRAINED, FidelityResult, FidelityScores, Sampling
from .sets import FidelitySets, require_disjoint

if TYPE_CHECKING:
    from ...data import ImageDataset
    from ...pipelines import DinoDiffusionPipeline

__all__ = [
    "LabelledFeatures",
    "compare_features",
    "evaluate_fidelity",
    "generate_features",
    "keep_best",
    "score_fidelity",
]

logger = logging.getLogger(__name__)


class LabelledFeatures(NamedTuple):
    """Features, and by key the labels (None, or an image that is not there: unknown) and patients of their images."""

    features: FeatureSet
    labels: Mapping[str, frozenset[str]] | None = None
    patients: Mapping[str, str] | None = None

    def having(self, label: str) -> LabelledFeatures:
        """Those of the images that have a label."""
        keys = [key for key in self.features.keys if label in (self.labels or {}).get(key, ())]
        return self._replace(features=self.features.select(keys))

    @property
    def groups(self) -> list[str] | None:
        """The patient of each image; None: unknown."""
        return [self.patients[key] for key in self.features.keys] if self.patients else None

    def is_enough(self, fewest: int) -> bool:
        """Whether there are so many images, of two patients at least: of one there is no interval."""
        return len(self.features) >= fewest and (not self.patients or len(set(self.groups)) > 1)


def evaluate_fidelity(
    models: DinoDiffusionPipeline | Iterable[Model],
    sets: FidelitySets,
    *,
    extractor: FeatureExtractor | None = None,
    folder: str | Path | None = None,
    untrained: bool = True,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    neighbors: int = 5,
    bootstrap_repeats: int = 200,
    labels: Mapping[str, Collection[str]] | None = None,
    fewest: int = 50,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> FidelityResult:
    """Generate an image from each source, by each model, and compare the sets with the reference.

    Args:
        models: A pipeline, or models of different names. An iterator such as `load_models` keeps one in memory.
        sets: Sources and reference: see `choose_sets`.
        extractor: Feature space, by default `pixels`.
        folder: Where features are kept, under a name that follows from weights, images and settings: another call
            with these computes only what is missing.
        untrained: Whether to add a row of the last model's UNet before training.
        num_inference_steps, guidance_scale, batch_size: See `Sampling`; each model has its own scheduler.
        neighbors: See `FidelityScores`.
        labels: Labels of each key of both sets, to score each label by itself, too: an image that was generated from a
            source with the label counts as one with it.
        fewest: Images of a label that either set must have for that.
        seed: Of noise and bootstrap.

    Raises:
        KeyError: If `labels` lacks an image.
        ValueError: If sources are in the reference, a set is too small, or no label has enough images.
        RuntimeError: If a model generates NaN, or another process is at work in the folder.
    """
    extractor = extractor or open_extractor("pixels")
    with nullcontext() if folder is None else work_folder(folder) as place_of_features:
        kept = partial(_kept, place_of_features, extractor.spec)

        def of_images(name: str, images: ImageDataset, place: str) -> LabelledFeatures:
            facts = place, images.preprocessing.fingerprint(), images.keys
            features = kept(name, facts, lambda: extract_features(extractor, images, batch_size, progress=progress))
            return LabelledFeatures(features, labels, sets.patients)

        sources = of_images("sources", sets.sources, sets.places[0])
        reference = of_images("reference", sets.reference, sets.places[1])
        keys = sources.features.keys
        require_disjoint(sources.features, reference.features)
        images = sets.sources.select(keys)  # without what cannot be read
        bootstrap = Bootstrap(bootstrap_repeats, seed, sources.groups, reference.groups)
        options = {"neighbors": neighbors, "bootstrap": bootstrap}
        tokens: dict[str, Tensor] = {}  # by the fingerprint of the conditioner, which checkpoints share
        logger.info("%d sources, %d real images of others as the reference", len(keys), len(reference.features))

        def row(name: str, pipe: DinoDiffusionPipeline, step: int | None = None) -> FidelityScores:
            parts = fingerprint_pipeline(pipe)
            dtype = str(pipe.denoiser.dtype).removeprefix("torch.")
            settings = (num_inference_steps, guidance_scale, seed, batch_size, dtype)
            sampling = Sampling(type(pipe.scheduler).__name__, *settings)

            def generate() -> FeatureSet:
                if parts["conditioner"] not in tokens:
                    tokens[parts["conditioner"]] = embed_images(pipe, images, batch_size)
                return generate_features(pipe, tokens[parts["conditioner"]], keys, extractor, sampling, progress)

            shown = sets.places[0], images.preprocessing.fingerprint(), keys
            features = kept(name, (parts, own_config(pipe.scheduler), sampling, *shown), generate)
            return scored(name, features, step=step, sampling=sampling)

        shares, too_few = _share_out(sources, reference, max(fewest, neighbors + 1))
        by_label: list[FidelityScores] = []

        def scored(name: str, features: FeatureSet, **facts: Any) -> FidelityScores:
            made = sources._replace(features=features)  # with the labels and patients of their sources
            scores = score_fidelity(name, features, reference.features, **options, **facts)
            frechet, kernel = scores.frechet.value, scores.kernel.value
            logger.info("%s: Fréchet distance %.4g, kernel distance %.4g", name, frechet, kernel)
            for label, theirs in shares.items():
                by_label.append(_score_quietly(name, made.having(label), theirs, label=label, **options, **facts))
            return scores

        rows, model = [], None
        for model in models_of(models):
            rows.append(row(model.name, model.pipe, model.step))
        if model is None:
            raise ValueError("There is no model to measure.")
        if untrained:
            rows.append(row(UNTRAINED, with_fresh_unet(model.pipe)))
        rows.append(scored(REAL, sources.features))
        order = list(shares)
        by_label.sort(key=lambda row: order.index(row.label))  # stable: of a label the rows are in their order
        return FidelityResult(tuple(rows), tuple(by_label), too_few)


def _share_out(
    sources: LabelledFeatures, reference: LabelledFeatures, fewest: int
) -> tuple[dict[str, LabelledFeatures], tuple[str, ...]]:
    """By label that enough images of both sets have, the most frequent first, those of the reference that have it.

    Then the labels that too few have.
    """
    if (labels := sources.labels) is None:
        return {}, ()
    keys = (*sources.features.keys, *reference.features.keys)
    if missing := [key for key in keys if key not in labels]:
        raise KeyError(f"{len(missing)} images have no labels, such as {', '.join(missing[:3])}")
    counts = Counter(label for key in keys for label in labels[key])
    names = sorted(counts, key=lambda name: (-counts[name], name))
    found = {name: reference.having(name) for name in names}
    shares = {n: x for n, x in found.items() if sources.having(n).is_enough(fewest) and x.is_enough(fewest)}
    if not shares:
        raise ValueError(
            f"No label has {fewest} sources and as many reference images, of two patients each: take a smaller "
            "`fewest`."
        )
    too_few = tuple(name for name in names if name not in shares)
    if too_few:
        logger.warning("Too few images to be scored by themselves: %s", ", ".join(too_few))
    return shares, too_few


def _score_quietly(
    name: str, ours: LabelledFeatures, theirs: LabelledFeatures, bootstrap: Bootstrap, **options: Any
) -> FidelityScores:
    """`score_fidelity` with the patients of both sets, and without its warning: the table says which are small."""
    bootstrap = replace(bootstrap, groups=ours.groups, reference_groups=theirs.groups)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*too few for features")
        return score_fidelity(name, ours.features, theirs.features, bootstrap=bootstrap, **options)


def compare_features(
    sets: Mapping[str, LabelledFeatures],
    reference: LabelledFeatures,
    *,
    neighbors: int = 5,
    bootstrap_repeats: int = 200,
    fewest: int = 50,
    seed: int = 0,
) -> FidelityResult:
    """A row for each set by name, then for each label that `fewest` images of the set and of the reference have.

    Arguments are those of `evaluate_fidelity`. ValueError if a set has not more images than `neighbors`.
    """
    fewest = max(fewest, neighbors + 1)
    smallest = min((len(one.features) for one in (*sets.values(), reference)), default=0)
    if smallest <= neighbors:
        raise ValueError(f"Distances of sets take more than {neighbors} images of each, and one set has {smallest}.")
    options = {"neighbors": neighbors, "bootstrap": Bootstrap(bootstrap_repeats, seed)}
    by_label: list[FidelityScores] = []
    too_few: list[str] = []
    known = reference.labels or {}
    counts = Counter(label for key in reference.features.keys for label in known.get(key, ()))
    for label in sorted(counts, key=lambda name: (-counts[name], name)):
        theirs, shares = reference.having(label), {name: one.having(label) for name, one in sets.items() if one.labels}
        enough = [name for name, one in shares.items() if one.is_enough(fewest) and theirs.is_enough(fewest)]
        by_label += [_score_quietly(name, shares[name], theirs, label=label, **options) for name in enough]
        if len(enough) < len(shares):
            too_few.append(label)
    rows = tuple(_score_quietly(name, one, reference, **options) for name, one in sets.items())
    return FidelityResult(rows, tuple(by_label), tuple(too_few))


def keep_best(
    result: FidelityResult,
    paths: Mapping[str, str | PathLike[str]],
    folder: str | Path,
    metric: Literal["frechet", "kernel"] = "frechet",
) -> None:
    """Write the checkpoint with the lowest distance as a whole pipeline, with `metric.json` as training's `best` has.

    `paths` says where the checkpoints are, by name. A `folder` that is there is replaced.
    """
    from ...training.models import load_trained_pipeline

    best = result.best_checkpoint(metric)
    facts = {
        "metric": f"{metric}_{best.features.extractor}",
        "value": getattr(best, metric).value,
        "step": best.step,
        "num_images": best.num_images,
        "num_reference": best.num_reference,
        "features": best.features.to_dict(),
    }
    with save_atomically(folder) as partial:
        load_trained_pipeline(paths[best.images]).save_pretrained(partial)
        write_json(partial / "metric.json", facts)
    logger.info("%s has the lowest %s distance; it is kept in %s", best.images, metric, folder)


def _kept(
    folder: Path | None, spec: FeatureSpec, name: str, facts: tuple[object, ...], compute: Callable[[], FeatureSet]
) -> FeatureSet:
    """Features from a file whose name follows from all that they depend on, computed if there is none."""
    if folder is None:
        return compute()
    path = folder / f"{name}-{hash_of(spec, *facts)[:16]}.safetensors"
    if not path.is_file():
        compute().save(path)
    return FeatureSet.load(path)


def generate_features(
    pipe: DinoDiffusionPipeline,
    tokens: Tensor,
    keys: Sequence[str],
    extractor: FeatureExtractor,
    sampling: Sampling,
    progress: bool = True,
) -> FeatureSet:
    """Generate an image from the tokens `(N, S, D)` of each source and keep its features, a batch at a time.

    Noise depends only on the seed and the key of a source. ValueError if `sampling` names another scheduler than that
    of the pipeline.
    """
    if len(tokens) != len(keys):
        raise ValueError(f"Expected a key for each of {len(tokens)} sources, got {len(keys)}.")
    if type(pipe.scheduler).__name__ != sampling.scheduler:
        raise ValueError(
            f"The pipeline has a {type(pipe.scheduler).__name__}, not the {sampling.scheduler} asked for."
        )
    call = {name: getattr(sampling, name) for name in ("batch_size", "num_inference_steps", "guidance_scale")}
    batches = generate_batches(pipe, tokens, keys, (sampling.seed, "fidelity"), progress=progress, **call)
    features = torch.cat([torch.empty(0, extractor.spec.dim), *map(extractor, batches)])
    return FeatureSet(features, tuple(keys), extractor.spec)


def score_fidelity(
    images: str,
    features: FeatureSet,
    reference: FeatureSet,
    *,
    step: int | None = None,
    sampling: Sampling | None = None,
    neighbors: int = 5,
    bootstrap: Bootstrap | None = None,
    label: str | None = None,
) -> FidelityScores:
    """All figures of one set of images, with their intervals (see `metrics.bootstrap`).

    `reference` are features of real images of other patients, `bootstrap` has the patients of both sets, and the other
    arguments are told of in `FidelityScores`. ValueError if the sets are of different extractors, or too small.
    """
    features.spec.require_same(reference.spec)
    bootstrap = bootstrap or Bootstrap()
    scores = FidelityScores(
        images,
        step,
        len(features),
        len(reference),
        features.spec,
        sampling,
        neighbors,
        bootstrap.repeats,
        bootstrap.seed,
        LEVEL,
        bootstrap.groups is not None,
        estimate_frechet(features, reference, bootstrap),
        estimate_kernel(features, reference, bootstrap),
        *estimate_manifolds(features, reference, neighbors, bootstrap),
        estimate_vendi(features, bootstrap),
        label,
    )
    if scores.is_singular:
        warnings.warn(
            f"{len(features)} images against {len(reference)} are too few for features of {features.spec.dim} "
            "dimensions: the Fréchet distance is biased upwards. Read the kernel distance beside it.",
            stacklevel=2,
        )
    return scores
