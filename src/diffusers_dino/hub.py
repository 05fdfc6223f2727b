"""Publish a trained model: its card, and an upload of nothing but the model and the card."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from .cards import cite, fact_table, is_hub_id, listed_names

__all__ = ["LORA_FILE", "model_card", "push_folder", "write_model_card"]

LORA_FILE = "pytorch_lora_weights.safetensors"

_USE_PIPELINE = """\
import torch
from diffusers.utils import load_image
from diffusers_dino import DinoDiffusionPipeline  # not DiffusionPipeline, which does not know this class

pipe = DinoDiffusionPipeline.from_pretrained("{model}").to("cuda")
variations = pipe(
    load_image("image.png"), num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)
).images
"""

_USE_LORA = """\
from diffusers_dino import DinoDiffusionPipeline

pipe = DinoDiffusionPipeline.from_pretrained("{base}").to("cuda")
pipe.load_lora_weights("{model}")
"""

_BODY = """\
# {title}

{summary}

The method is DiNO-Diffusion: the place that the prompt has in Stable Diffusion is taken by the tokens that a frozen
DINO encoder computes from an image, so training needs images and no annotations.

## Usage

`pip install diffusers-dino`, then:

```python
{usage}```

## How it was trained

{facts}

## Intended use

Research on generative models of images like those it was trained on: semantic variations of an image, synthetic data
for training and testing other models, and study of what the encoder's tokens hold. It is not a medical device. Nothing
that it makes, and nothing derived from that, may be used to diagnose or treat a patient.

## Limits

- It makes images that look like its training data, with that data's gaps and biases: scanners, projections, ages,
  diseases. A variation keeps what the encoder's tokens hold of the source; whether that includes a given finding has
  to be measured before labels are carried over.
- Images of other kinds as a source give plausible images of the trained kind, without a warning.
- Its own likeness to real images says nothing about use for a task: measure that on real, held-back data.

## Privacy

Diffusion models can memorise training images and give them back. If the training images are of patients, treat the
weights and the generated images as the data's terms treat data derived from it, check generated images for
near-copies of training images before sharing them, and remember that a variation is made from its source: do not
publish variations of images that you may not publish.

## Citation

```bibtex
{citation}```
"""


def model_card(
    model: str,
    training: Mapping[str, Any],
    *,
    base_model: str | Iterable[str] | None = None,
    datasets: str | Iterable[str] | None = None,
    license: str | None = None,
    lora: bool = False,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Describe a trained model.

    Args:
        model: Its Hub id, or a name.
        training: How it was trained, as facts by name: data, steps, batch size, resolution, ... Values that are local
            paths are shortened to their last part, as folder names can tell more than is meant to be published.
        base_model: Models that it was made from: the encoder, the VAE, the UNet's start; for a LoRA, the pipeline.
            Those that are no Hub ids appear in the text alone.
        datasets: Data sets that it was trained on, likewise.
        license: Of the weights, as the Hub spells it, such as `"apache-2.0"`.
        lora: Whether it is a LoRA of the UNet rather than a pipeline.
        tags: Further tags for the Hub's search.

    Returns:
        A card whose `data` holds the metadata; `str()` of it is the README.
    """
    base_models, data = listed_names(base_model), listed_names(datasets)
    kind = ["lora"] if lora else ["diffusers:DinoDiffusionPipeline"]
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        license=license,
        base_model=[name for name in base_models if is_hub_id(name)] or None,
        datasets=[name for name in data if is_hub_id(name)] or None,
        tags=["diffusers", "diffusers-dino", "dino", *kind, *tags],
    )
    usage = (_USE_LORA if lora else _USE_PIPELINE).format(model=model, base=(base_models or ["org/base-pipeline"])[0])
    facts = {"made from": base_models, "data": data, **training}
    body = _BODY.format(
        title=model.split("/")[-1],
        summary="A LoRA for a latent diffusion model that is conditioned on images."
        if lora
        else "A latent diffusion model that is conditioned on images.",
        usage=usage,
        facts=fact_table(facts),
        citation=cite(),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def write_model_card(folder: str | os.PathLike, model: str, training: Mapping[str, Any], **options: Any) -> Path:
    """Write `model_card(...)` as the folder's README.md and return its path."""
    path = Path(folder) / "README.md"
    model_card(model, training, **options).save(path)
    return path


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    also: Iterable[str] = (),
) -> str:
    """Upload a trained pipeline or LoRA from the folder of its training.

    What is uploaded is listed, not what is left out: the card, `model_index.json` with its components' configs and
    safetensors, or the LoRA's weights. Logs, checkpoints, arguments and validation pictures, which may show patients,
    stay at home.

    Args:
        folder: Written by `save_pretrained`, `save_lora_weights` or a training script.
        repo_id: `"org/name"`, or `"name"` in the token owner's own space; made if it does not exist.
        token: By default the one that `hf auth login` stored.
        private: Whether a repository that is made here is private.
        commit_message: Of the upload.
        also: Patterns of further files to upload, such as `"samples/*.png"`.

    Returns:
        The full id of the repository, `"org/name"`.

    Raises:
        FileNotFoundError: If the folder holds neither a pipeline nor a LoRA.
    """
    patterns = ["README.md", *_model_files(Path(folder)), *also]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=patterns, commit_message=commit_message)
    return repo_id


def _model_files(folder: Path) -> list[str]:
    index = folder / "model_index.json"
    if index.is_file():
        names = [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
        return ["model_index.json", *(f"{name}/*.{kind}" for name in names for kind in ("json", "safetensors"))]
    if (folder / LORA_FILE).is_file():
        return [LORA_FILE]
    raise FileNotFoundError(
        f"There is nothing to upload in {folder}: it holds neither a pipeline (model_index.json) nor a LoRA "
        f"({LORA_FILE})."
    )
