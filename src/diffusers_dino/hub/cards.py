"""The cards of a trained model and of a synthetic set: templates filled from the run and from what was measured."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from ..files import atomic_write
from .folder import class_of, folder_kind, part_facts, sampler_of
from .markdown import cite, fact_table, origin, plain, table, without_html
from .privacy import is_hub_id, listed_names
from .record import TrainingRecord

if TYPE_CHECKING:
    from ..synthesis import SyntheticSet

__all__ = [
    "CARD",
    "Measurement",
    "dataset_card",
    "folder_card",
    "model_card",
    "write_dataset_card",
    "write_model_card",
]

CARD = "README.md"
_TEMPLATES = Path(__file__).with_name("templates")
# What a card can be of, and its task on the Hub.
_TASKS = {
    "DinoDiffusionPipeline": "image-to-image",
    "DinoInterpolationPipeline": "image-to-image",
    "DiffSegPipeline": "image-segmentation",
    "DinoPriorPipeline": None,
    "lora": "image-to-image",
    "conditioner": "image-feature-extraction",
    "vae": None,
}
# Numbers of samples, and what the Hub calls sets of fewer.
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


@dataclass(frozen=True)
class Measurement:
    """What a card tells of one result.

    Attributes:
        heading: What was asked.
        text: Markdown, with N and all that the figures depend on.
        metrics: The model's own figures, without its controls; N is in `metric_args`.
        works: What to cite besides the method, by BibTeX key.
        is_privacy: Whether it is about copies of training images.
    """

    heading: str
    text: str
    metrics: tuple[EvalResult, ...] = ()
    works: tuple[str, ...] = ()
    is_privacy: bool = False


def model_card(
    model: str,
    record: TrainingRecord,
    *,
    kind: str = "DinoDiffusionPipeline",
    parts: Mapping[str, Any] | None = None,
    sampler: str | None = None,
    measurements: Sequence[Measurement] = (),
    samples: Mapping[str, str] | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Describe a trained model.

    Args:
        model: Its Hub id, or a name.
        record: How it was trained. Only the last part of a local path is told, and nothing of local data sets, since
            names of folders can tell more than should be published.
        kind: Class of the pipeline, `"lora"`, `"conditioner"`, or the class of an autoencoder.
        parts: Facts of preprocessing and components, by name.
        sampler: Class of the scheduler in the folder of a distilled LoRA.
        measurements: As `measurements.read_results` reads them.
        samples: Pictures in the repository by path, with their captions; only of phantoms or synthetic images.
        license: Of the weights, as the Hub spells it, such as `"apache-2.0"`.
        tags: Further tags for the Hub's search.

    Returns:
        A card whose `data` holds the metadata; `str()` of it is the README.
    """
    key = "vae" if kind.startswith("Autoencoder") else kind
    if key not in _TASKS:
        raise ValueError(f"A card is of {', '.join(_TASKS)}, not {kind!r}.")
    bases, datasets = listed_names(record.base_models), list(filter(is_hub_id, listed_names(record.datasets)))
    model = plain(model)
    title = model.split("/")[-1]
    metrics = [one for measurement in measurements for one in measurement.metrics if math.isfinite(one.metric_value)]
    metadata = ModelCardData(
        model_name=title if metrics else None,
        eval_results=metrics or None,
        library_name="diffusers",
        pipeline_tag=_TASKS[key],
        license=license,
        base_model=[name for name in bases if is_hub_id(name)] or None,
        datasets=datasets or None,
        tags=["diffusers", "diffusers-dino", "dino", f"diffusers:{kind}" if "Pipeline" in kind else key, *tags],
    )
    origins = [f"Data sets of the Hub: {', '.join(f'`{name}`' for name in datasets)}."] if datasets else []
    if record.sources or not datasets:
        origins.append(origin(record.sources, "model"))
    parts = parts or {}
    works = {"DiffSegPipeline": ["tian2024diffuse"], "DinoPriorPipeline": ["li2024return"]}.get(kind, [])
    works = works + ["oquab2024dinov2"] * any("dinov2" in str(value) for value in parts.values())
    return _fill(
        ModelCard,
        "model_card.md",
        metadata,
        measurements,
        works=works,
        title=title,
        kind=key,
        class_name=kind,
        model=model,
        base=plain(next(iter(bases), "org/base-pipeline")),
        origin="\n\n".join(origins),
        parts=fact_table(parts),
        sampler=sampler,
        labels=parts.get("labels"),
        tells_unlike="familiarity" in parts,
        facts=fact_table({"made from": bases, **record.facts}),
        samples={path: plain(caption) for path, caption in (samples or {}).items()},
    )


def folder_card(folder: str | os.PathLike, model: str, record: TrainingRecord, **options: Any) -> ModelCard:
    """`model_card` of the pipeline, LoRA, conditioner or autoencoder in a folder, which tells its kind and parts."""
    kind = folder_kind(folder)
    kind = class_of(folder) if kind in ("pipeline", "vae") else kind
    return model_card(model, record, kind=kind, parts=part_facts(folder), sampler=sampler_of(folder), **options)


def write_model_card(folder: str | os.PathLike, model: str, record: TrainingRecord, **options: Any) -> Path:
    """Write the card of the model in a folder as its README.md and return the path.

    The arguments are those of `model_card`; kind and parts are read from the folder.

    Raises:
        FileNotFoundError: If the folder holds no model.
    """
    return _write(folder_card(folder, model, record, **options), folder)


def dataset_card(
    made: SyntheticSet,
    title: str = "Synthetic images",
    *,
    model: str | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
    measurements: Sequence[Measurement] = (),
    license: str | None = None,
    tags: Iterable[str] = (),
) -> DatasetCard:
    """Describe a finished synthetic set. What is not listed here is as in `model_card`.

    Args:
        made: The set.
        title: Of the card.
        model: Name of the model that made it; a local path is shortened to its last part.
        sources: The data sets of its real images, as `diffusers_dino.data.sharding.recorded_sources` reads them.
    """
    plan, title = made.plan, plain(title)
    metadata = DatasetCardData(
        license=license,
        pretty_name=title,
        annotations_creators=["machine-generated"],
        source_datasets=["extended"],
        size_categories=[next((name for limit, name in _SIZES.items() if len(made) < limit), "n>10M")],
        task_categories=["image-classification"] if plan.label_sets else ["unconditional-image-generation"],
        tags=["synthetic", "webdataset", "diffusers-dino", *tags],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
    )
    return _fill(
        DatasetCard,
        "dataset_card.md",
        metadata,
        measurements,
        title=title,
        count=len(made),
        side=plan.made_with["image_size"],
        num_sources=len(plan.keys),
        format=plan.settings.format,
        recipe=fact_table(_recipe(made, model)),
        origin=origin(sources, "set"),
        strategy=plan.strategy,
        soft=plan.exponent,
        labels=table(["label", "images" if plan.exponent is None else "sum of probabilities"], _count_labels(made))
        if plan.label_sets
        else "",
        gate=made.manifest["lineage"]["gate"],
        gate_name=plain(str(made.manifest["lineage"]["gate"]["fingerprint"])),
    )


def write_dataset_card(made: SyntheticSet, title: str = "Synthetic images", **options: Any) -> Path:
    """Write `dataset_card(...)` as the set's README.md and return its path."""
    return _write(dataset_card(made, title, **options), made.folder)


def _fill(
    card: type[ModelCard | DatasetCard],
    template: str,
    metadata: ModelCardData | DatasetCardData,
    measurements: Sequence[Measurement],
    works: Iterable[str] = (),
    **content: Any,
) -> Any:
    def sections(is_privacy: bool) -> str:
        told = (m for m in measurements if m.is_privacy == is_privacy)
        return "\n\n".join(f"### {plain(m.heading)}\n\n{without_html(m.text)}" for m in told)

    return card.from_template(
        metadata,
        template_str=(_TEMPLATES / template).read_text(encoding="utf-8") + "\n",  # Jinja drops the last end of a line
        measured=sections(False),
        privacy=sections(True),
        citation=cite(*works, *(work for measurement in measurements for work in measurement.works)),
        **content,
    )


def _write(card: ModelCard | DatasetCard, folder: str | os.PathLike) -> Path:
    path = Path(folder) / CARD
    with atomic_write(path) as file:
        file.write(str(card).encode())
    return path


def _recipe(made: SyntheticSet, model: str | None) -> dict[str, Any]:
    plan, lineage = made.plan, made.manifest["lineage"]
    settings, sources = plan.settings, lineage["sources"]
    versions = sorted({f"torch {e['torch']}, diffusers {e['diffusers']}" for e in lineage["environments"]})
    return {
        "model": model,
        "fingerprints": [f"{name} {value}" for name, value in plan.made_with["model"].items()],
        "strategy": plan.strategy,
        "soft labels, exponent": plan.exponent,
        "real images used": len(plan.keys) or None,
        "of them unlike the model's training images": f"{sources['unlike']} (familiarity below "
        f"{sources['familiarity_below']})"
        if "unlike" in sources
        else None,
        "synthetic images for each": f"{len(plan) / len(plan.keys):.3g}" if plan.keys else None,
        "sampling steps": settings.num_inference_steps,
        "guidance": settings.guidance_scale,
        "rescaled guidance": settings.guidance_rescale,
        "eta": settings.eta,
        "restored norm of tokens": settings.restore_norm,
        "images computed together": settings.batch_size,
        "threads": settings.threads,
        "stored": f"{settings.format}{f', quality {settings.quality}' * (settings.format == 'jpg')}",
        "one channel, the mean of three": settings.grayscale,
        "attempts for each image": settings.max_attempts,
        "seed": plan.seed,
        "plan": plan.digest,
        "computed with": [*versions, f"diffusers-dino {lineage['diffusers_dino']}"],
        "computed on": sorted({e["device"] for e in lineage["environments"]}),
    }


def _count_labels(made: SyntheticSet) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    for image in made.planned():
        given = image.given
        counts.update({"(unknown)": 1} if given is None else given or {"(none)": 1})  # adds probabilities up
    form = ",.0f" if made.plan.exponent is None else ",.1f"
    return [(label, f"{n:{form}}") for label, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
