"""What a card tells of the results of evaluations: text for people, metrics for the Hub, and no key of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.augmentation.result import AugmentationResult
from ..evaluation.augmentation.table import format_augmentation_table
from ..evaluation.fidelity.result import REAL, UNTRAINED, FidelityResult
from ..evaluation.fidelity.table import format_fidelity_table
from ..evaluation.interpolation.protocol import InterpolationResult
from ..evaluation.labels.result import LabelPreservationResult
from ..evaluation.labels.table import format_preservation_table
from ..evaluation.memorization.protocol import MemorizationResult
from ..evaluation.memorization.sets import SetFigures
from ..evaluation.reconstruction.protocol import ReconstructionResult
from ..evaluation.results import JsonResult
from ..evaluation.segmentation.protocol import SegmentationResult
from ..evaluation.segmentation.table import format_segmentation_table
from ..files import read_json
from .cards import Measurement
from .markdown import fact_table, table, table_cell

__all__ = ["describe_result", "read_result", "read_results"]


def read_result(path: str | Path) -> JsonResult | None:
    """The result of an evaluation in a JSON file, known by its fields; None if it is something else.

    Files of older versions may lack those that have a default.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    names = set(content) if isinstance(content, dict) else set()
    kind = next((kind for kind in _DESCRIBE if _required(kind) <= names <= {f.name for f in fields(kind)}), None)
    try:
        return None if kind is None else kind.load(path)
    except (KeyError, TypeError, ValueError):  # the names are right, what is in them is not
        return None


def _required(kind: type[JsonResult]) -> set[str]:
    return {field.name for field in fields(kind) if field.default is MISSING}


def read_results(paths: Iterable[str | Path], dataset: str = "held-out images") -> list[Measurement]:
    """What a card tells of all results in JSON files and in folders with their subfolders.

    `dataset` names the images that the figures are of; a segmentation has its own.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a path holds no result, or a search for copies was given no synthetic images.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There are no results at {path}.")
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        results = [result for result in map(read_result, files) if result is not None]
        if not results:
            kinds = ", ".join(kind.__name__ for kind in _DESCRIBE)
            raise ValueError(f"{path} holds no result of an evaluation ({kinds}).")
        found += results
    order = list(_DESCRIBE)
    return [describe_result(result, dataset) for result in sorted(found, key=lambda one: order.index(type(one)))]


def describe_result(result: JsonResult, dataset: str = "held-out images") -> Measurement:
    """What a card tells of one result. Keys of images, which can name patients, are left out."""
    return _DESCRIBE[type(result)](result, dataset)


def _metric(
    dataset: str, task: str, kind: str, name: str, value: float, args: Mapping[str, Any], task_type: str | None = None
) -> EvalResult:
    return EvalResult(
        task_type=task_type or "image-to-image",
        task_name=task,
        dataset_type=dataset.lower().replace(" ", "-"),
        dataset_name=dataset,
        metric_type=kind,
        metric_name=name,
        metric_value=float(f"{value:.6g}"),
        metric_args=dict(args),
    )


def _reconstruction(result: ReconstructionResult, dataset: str) -> Measurement:
    n, spaces = result.num_images, {"the encoder": result.by_encoder, "16 x 16 pixels": result.by_pixels}
    controls = ("generated", "shuffled", "untrained", "nearest_training_image")
    shares = {name: {one: getattr(space, one) for one in controls} for name, space in spaces.items()}
    columns = {name: {**row, "chance": 1 / n} for name, row in shares.items()}
    text = (
        f"One image is generated from each of N = {n} unseen ones; shares whose nearest neighbour among the {n} is "
        f"their own source. Mean of {len(result.seeds)} seeds, {result.num_inference_steps} steps, guidance "
        f"{result.guidance_scale:g} rescaled by {result.guidance_rescale:g}; {result.num_training_images} training "
        "images.\n\n"
        f"{_beside_controls('finds its source first', columns)}"
    )
    args = {
        "num_images": n,
        "seeds": list(result.seeds),
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "guidance_rescale": result.guidance_rescale,
    }
    task, metric = "semantic variations of unseen images", "top-1 retrieval of the source by"
    metrics = [
        _metric(dataset, task, "accuracy", f"{metric} {name}, N = {n}", row["generated"], args)
        for name, row in shares.items()
    ]
    return Measurement("Variations of unseen images", text, tuple(metrics))


def _interpolation(result: InterpolationResult, dataset: str) -> Measurement:
    n, spaces = result.num_pairs, {"the encoder": result.by_encoder, "16 x 16 pixels": result.by_pixels}
    controls = ("generated", "untrained", "nearest_training_image", "pixel_blend")
    shares = {name: {one: getattr(space, one).monotone_paths for one in controls} for name, space in spaces.items()}
    text = (
        f"Share of paths between N = {n} pairs of unseen images on which each of {len(result.fractions) - 1} steps "
        f"leaves the source and approaches the target. {len(result.seeds)} seeds, {result.num_inference_steps} steps, "
        f"guidance {result.guidance_scale:g}, {result.method}.\n\n{_beside_controls('monotone paths', shares)}"
    )
    args = {"num_pairs": n, "seeds": list(result.seeds), "num_inference_steps": result.num_inference_steps}
    task, kind = "interpolation", "monotone_paths"
    metrics = [
        _metric(dataset, task, kind, f"monotone paths by {name}, N = {n} pairs", row["generated"], args)
        for name, row in shares.items()
    ]
    return Measurement("Paths between unseen images", text, tuple(metrics))


def _beside_controls(title: str, shares: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each space of features, a column for the generated images and for each control."""
    names = [name.replace("_", " ") for name in next(iter(shares.values()))]
    rows = [[f"by {space}", *(f"{share:.3f}" for share in row.values())] for space, row in shares.items()]
    return table([title, *names], rows)


def _fidelity(result: FidelityResult, dataset: str) -> Measurement:
    metrics = []
    for row in result.rows:
        if row.images in (REAL, UNTRAINED):
            continue
        args = {
            "images": table_cell(row.images),
            "num_images": row.num_images,
            "num_reference": row.num_reference,
            "features": row.features.to_dict(),
            "sampling": None if row.sampling is None else asdict(row.sampling),
        }
        sizes = f"N = {row.num_images} against M = {row.num_reference}"
        for kind, name, figure in (("fid", "Fréchet distance", row.frechet), ("kid", "kernel distance", row.kernel)):
            full = f"{name}, {row.features.extractor} features, {sizes}, {table_cell(row.images)}"
            interval = {"low": figure.low, "high": figure.high, "level": row.level}
            metrics.append(_metric(dataset, "likeness to real images", kind, full, figure.value, args | interval))
    used_xrv = any(row.features.extractor.startswith("xrv") for row in result.rows)
    works = ("cohen2022torchxrayvision",) if used_xrv else ()
    return Measurement("Likeness to real images", format_fidelity_table(result).strip(), tuple(metrics), works)


def _segmentation(result: SegmentationResult, _: str) -> Measurement:
    n = len(result.keys)
    models = {sweep.method for sweep in result.sweeps if "untrained" not in sweep.method}
    metrics = [
        _metric(
            table_cell(result.dataset),
            "zero-shot segmentation",
            "dice",
            f"mean Dice, {table_cell(scores.method)}, {table_cell(scores.selection)}, N = {n}",
            scores.mean,
            {"num_images": n, "low": scores.low, "high": scores.high, "mask_size": result.mask_size},
            "image-segmentation",
        )
        for scores in result.methods
        if scores.method in models
    ]
    text = f"N = {n} images, Dice at {result.mask_size} px.\n\n{format_segmentation_table([result]).strip()}"
    return Measurement(f"Segmentation: {table_cell(result.dataset)}", text, tuple(metrics), ("tian2024diffuse",))


def _memorization(result: MemorizationResult, _: str) -> Measurement:
    found = result.synthetic
    if found is None:
        raise ValueError("The search for copies was given no synthetic images: repeat it with them.")
    text = fact_table(
        {
            "images compared with the training images": found.num_images,
            "near-copies of training images": _share_text(found),
            "the same of real images that were not trained on": result.held_out and _share_text(result.held_out),
            "farther from their nearest training image than that is from its own (AuthPct)": _percent(found.authentic),
            "threshold": f"calibrated for {_percent(result.false_alarms)} false alarms on real images",
            "feature space": result.spec.extractor,
        }
    )
    if result.planted:
        rows = [(one.change, one.num_images, f"{one.found:.3f}") for one in result.planted]
        text += f"\n\nWhat the same search finds of planted copies:\n\n{table(['change', 'N', 'share found'], rows)}"
    args = {
        "num_images": found.num_images,
        "copies": found.copies,
        "low": found.low,
        "high": found.high,
        "false_alarms": result.false_alarms,
        "features": result.spec.to_dict(),
    }
    name = f"share of near-copies of training images, N = {found.num_images}"
    metric = _metric("training images", "generated images against them", "near_copies", name, found.share, args)
    return Measurement("Copies of training images", text, (metric,), is_privacy=True)


def _labels(result: LabelPreservationResult, _: str) -> Measurement:
    return Measurement("Labels of synthetic images", format_preservation_table(result).strip())


def _augmentation(result: AugmentationResult, _: str) -> Measurement:
    return Measurement("Training classifiers with synthetic images", format_augmentation_table(result).strip())


# In the order in which a card tells of them.
_DESCRIBE: dict[type[JsonResult], Callable[[Any, str], Measurement]] = {
    ReconstructionResult: _reconstruction,
    InterpolationResult: _interpolation,
    FidelityResult: _fidelity,
    SegmentationResult: _segmentation,
    LabelPreservationResult: _labels,
    AugmentationResult: _augmentation,
    MemorizationResult: _memorization,
}


def _share_text(figures: SetFigures) -> str:
    interval = f"{_percent(figures.low)} to {_percent(figures.high)}"
    return f"{figures.copies} ({_percent(figures.share)}; 95 % interval {interval})"


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")
