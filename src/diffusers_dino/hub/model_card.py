"""The card of a trained model, written from the run itself and from what was measured of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_json
from .cards import cite, fact_table, is_hub_id, listed_names, source_table, terms_notice
from .folder import class_of, folder_kind, part_facts

__all__ = ["RECORD_FILE", "Measurement", "TrainingRecord", "folder_card", "model_card", "write_model_card"]

RECORD_FILE = "training_record.json"

_USAGE = {
    "DinoDiffusionPipeline": """\
import torch
from diffusers.utils import load_image
from diffusers_dino import DinoDiffusionPipeline  # not DiffusionPipeline, which does not know this class

pipe = DinoDiffusionPipeline.from_pretrained("{model}").to("cuda")
variations = pipe(
    load_image("image.png"), num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)
).images
""",
    "DinoInterpolationPipeline": """\
from diffusers.utils import load_image
from diffusers_dino import DinoInterpolationPipeline

pipe = DinoInterpolationPipeline.from_pretrained("{model}").to("cuda")
path = pipe(load_image("one.png"), load_image("other.png"), fractions=[0, 0.25, 0.5, 0.75, 1]).images
""",
    "DiffSegPipeline": """\
from diffusers.utils import load_image
from diffusers_dino import DiffSegPipeline

pipe = DiffSegPipeline.from_pretrained("{model}").to("cuda")
masks = pipe(load_image("image.png"), timestep=300, merge_threshold=0.5).masks
""",
    "lora": """\
from diffusers_dino import DinoDiffusionPipeline

pipe = DinoDiffusionPipeline.from_pretrained("{base}").to("cuda")
pipe.load_lora_weights("{model}")
""",
    "conditioner": """\
from diffusers.utils import load_image
from diffusers_dino import DinoImageConditioner

conditioner = DinoImageConditioner.from_pretrained("{model}")
tokens = conditioner.encode(load_image("image.png"))  # (1, tokens, width)
""",
    "vae": """\
from diffusers import {class_name}

vae = {class_name}.from_pretrained("{model}")  # for `train_dino.py --vae {model}`
""",
}

# Kind -> what it is, its task on the Hub.
_SUMMARIES = {
    "DinoDiffusionPipeline": ("A latent diffusion model that is conditioned on images.", "image-to-image"),
    "DinoInterpolationPipeline": ("A latent diffusion model that makes images between two others.", "image-to-image"),
    "DiffSegPipeline": ("A latent diffusion model whose self-attention segments images.", "image-segmentation"),
    "lora": ("A LoRA for a latent diffusion model that is conditioned on images.", "image-to-image"),
    "conditioner": (
        "An encoder with its preprocessing: images to the condition of a latent diffusion model.",
        "image-feature-extraction",
    ),
    "vae": ("The autoencoder of a latent diffusion model.", None),
}

_BODY = """\
# {title}

{summary}

The method is DiNO-Diffusion: the place that the prompt has in Stable Diffusion is taken by the tokens that a frozen
DINO encoder computes from an image, so training needs images and no annotations.

## Usage

`pip install diffusers-dino`, then:

```python
{usage}```

## What it was trained on

{origin}

## Preprocessing and parts

{parts}

## How it was trained

{facts}

## What was measured

{measured}

{samples}## Intended use

Research on generative models of images like those it was trained on: semantic variations of an image, synthetic data
for training and testing other models, and study of what the encoder's tokens hold. It is not a medical device. Nothing
that it makes, and nothing derived from that, may be used to diagnose or treat a patient.

## Limits

{limits}
## Privacy

{privacy}

Models can memorise training images, and diffusion models give them back. If the training images are of patients,
treat the weights and the generated images as the data's terms treat data derived from it, check generated images for
near-copies of training images before sharing them, and remember that a variation is made from its source: do not
publish variations of images that you may not publish.

## Citation

```bibtex
{citation}```
"""

_LIMITS_OF_PIPELINES = """\
- It makes images that look like its training data, with that data's gaps and biases: scanners, projections, ages,
  diseases. A variation keeps what the encoder's tokens hold of the source; whether that includes a given finding has
  to be measured before labels are carried over.
- Images of other kinds as a source give plausible images of the trained kind, without a warning.
- Its own likeness to real images says nothing about use for a task: measure that on real, held-back data.
"""

_LIMITS = {
    "conditioner": """\
- Its tokens tell apart what its training images taught it to, with that data's gaps and biases. Whether they hold a
  given finding has to be measured.
- Images of other kinds give tokens too, without a warning.
""",
    "vae": """\
- What it does not keep of an image no model on top of it can bring back: look at reconstructions of your own images,
  and at small findings in them, first.
- Images of other kinds are reconstructed worse, without a warning.
""",
}

_NOT_MEASURED = (
    "Copies of training images were **not measured**. diffusers-dino has `examples/eval_memorization.py` for that."
)


@dataclass(frozen=True)
class Measurement:
    """The figures of one result file.

    Attributes:
        heading: What was asked.
        text: Markdown, with N and all that the figures depend on.
        metrics: The model's own figures, without its controls; N is in `metric_args`.
        works: What to cite besides the method, as `cards.cite` names it.
        is_privacy: Whether it is about copies of training images.
    """

    heading: str
    text: str
    metrics: tuple[EvalResult, ...]
    works: tuple[str, ...] = ()
    is_privacy: bool = False


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained and on what, kept beside it for cards that are written later.

    Attributes:
        facts: By name: images, updates, batch size, learning rate, ...
        base_models: What it was made from: the encoder, the VAE, the UNet's start; for a LoRA, the pipeline.
        datasets: Data sets of the Hub that it was trained on.
        sources: Data sets that the images are from, as `cards.source_table` takes them.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    sources: Sequence[Mapping[str, Any]] = ()

    def save(self, folder: str | os.PathLike) -> None:
        """Write `training_record.json`."""
        write_json(Path(folder) / RECORD_FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> TrainingRecord:
        """Read what `save` wrote; an empty record where there is none.

        Raises:
            ValueError: If the file is damaged.
        """
        path = Path(folder) / RECORD_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no record of a training: {error}.") from error


def model_card(
    model: str,
    record: TrainingRecord,
    *,
    kind: str = "DinoDiffusionPipeline",
    parts: Mapping[str, Any] | None = None,
    measurements: Sequence[Measurement] = (),
    samples: Mapping[str, str] | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Describe a trained model.

    Args:
        model: Its Hub id, or a name.
        record: How it was trained. Of local paths the last part alone is told, and of local data sets nothing, as
            names of folders can tell more than is meant to be published.
        kind: Class of the pipeline, `"lora"`, `"conditioner"`, or the class of an autoencoder.
        parts: Preprocessing and components, as `model_folder.part_facts` reads them.
        measurements: What to tell of it; `examples/measured.py` reads them from what the protocols wrote.
        samples: Pictures in the repository by path, with their captions: of phantoms or synthetic images alone.
        license: Of the weights, as the Hub spells it, such as `"apache-2.0"`.
        tags: Further tags for the Hub's search.

    Returns:
        A card whose `data` holds the metadata; `str()` of it is the README.

    Raises:
        ValueError: If the kind is unknown.
    """
    key = "vae" if kind.startswith("Autoencoder") else kind
    if key not in _SUMMARIES:
        raise ValueError(f"A card is of {', '.join(_SUMMARIES)}, not {kind!r}.")
    summary, task = _SUMMARIES[key]
    bases, datasets = listed_names(record.base_models), list(filter(is_hub_id, listed_names(record.datasets)))
    title = model.split("/")[-1]
    metrics = [one for measurement in measurements for one in measurement.metrics if math.isfinite(one.metric_value)]
    metadata = ModelCardData(
        model_name=title if metrics else None,
        eval_results=metrics or None,
        library_name="diffusers",
        pipeline_tag=task,
        license=license,
        base_model=[name for name in bases if is_hub_id(name)] or None,
        datasets=datasets or None,
        tags=["diffusers", "diffusers-dino", "dino", f"diffusers:{kind}" if "Pipeline" in kind else key, *tags],
    )
    base = next(iter(bases), "org/base-pipeline")
    body = _BODY.format(
        title=title,
        summary=summary,
        usage=_USAGE[key].format(model=model, base=base, class_name=kind),
        origin=_origin(record, datasets),
        parts=fact_table(parts or {}),
        facts=fact_table({"made from": bases, **record.facts}),
        measured=_sections(one for one in measurements if not one.is_privacy) or "Nothing was measured.",
        samples=_samples(samples or {}),
        limits=_LIMITS.get(key, _LIMITS_OF_PIPELINES),
        privacy=_sections(one for one in measurements if one.is_privacy) or _NOT_MEASURED,
        citation=cite(*_works(kind, parts or {}, measurements)),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def folder_card(folder: str | os.PathLike, model: str, record: TrainingRecord, **options: Any) -> ModelCard:
    """The card of the model in a folder.

    Args:
        folder: A trained pipeline, LoRA, conditioner or autoencoder.
        model: Its Hub id, or a name.
        record: How it was trained.
        options: Those of `model_card`; kind and parts are read from the folder.

    Raises:
        FileNotFoundError: If the folder holds no model.
    """
    kind = folder_kind(folder)
    kind = class_of(folder) if kind in ("pipeline", "vae") else kind
    return model_card(model, record, kind=kind, parts=part_facts(folder), **options)


def write_model_card(folder: str | os.PathLike, model: str, record: TrainingRecord, **options: Any) -> Path:
    """Write `folder_card(...)` as the folder's README.md and return its path."""
    path = Path(folder) / "README.md"
    folder_card(folder, model, record, **options).save(path)
    return path


def _origin(record: TrainingRecord, datasets: Sequence[str]) -> str:
    named = [f"Data sets of the Hub: {', '.join(f'`{name}`' for name in datasets)}."] if datasets else []
    if not record.sources:
        return "\n\n".join(named) or (
            "Which data sets the images are from is not on record here. Their terms apply to what is derived from "
            "them, this model included."
        )
    terms = "Their terms apply to what is derived from them, this model included."
    return "\n\n".join(filter(None, [*named, source_table(record.sources), terms, terms_notice(record.sources)]))


def _sections(measurements: Iterable[Measurement]) -> str:
    return "\n\n".join(f"### {one.heading}\n\n{one.text}" for one in measurements)


def _samples(samples: Mapping[str, str]) -> str:
    if not samples:
        return ""
    pictures = "\n\n".join(f"![{caption}]({path})\n\n{caption}" for path, caption in samples.items())
    return f"## Samples\n\n{pictures}\n\n"


def _works(kind: str, parts: Mapping[str, Any], measurements: Iterable[Measurement]) -> list[str]:
    works = [work for measurement in measurements for work in measurement.works]
    if kind == "DiffSegPipeline":
        works.append("diffseg")
    if any("dinov2" in str(value) for value in parts.values()):
        works.append("dinov2")
    return works
