"""What a folder of a trained model holds: its kind, the files of the model, and what their configs say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffusers_dino

from ..denoisers import family_named
from ..diffseg.settings import noted_settings
from ..familiarity import STATISTICS, TokenStatistics
from ..files import read_json
from ..pipelines.checks import default_steps
from ..pipelines.preparation import read_preparation
from .privacy import Content

__all__ = ["class_of", "folder_kind", "half_precision_files", "model_files", "part_facts", "sampler_of", "variant_of"]

_INDEX = "model_index.json"
_LORA = "pytorch_lora_weights.safetensors"
_SCHEDULER = "scheduler/scheduler_config.json"
_COMPONENTS = {"DinoImageConditioner": "conditioner", "AutoencoderKL": "vae", "AutoencoderTiny": "vae"}
_WEIGHTS = "diffusion_pytorch_model"
_OF_DISTILLED = ("LCMScheduler", "TCDScheduler")


def folder_kind(folder: str | Path) -> str:
    """`"pipeline"`, `"lora"`, `"conditioner"` or `"vae"`."""
    folder = Path(folder)
    if (folder / _INDEX).is_file():
        return "pipeline"
    if (folder / _LORA).is_file():
        return "lora"
    class_name = _read(folder / "config.json").get("_class_name")
    if class_name in _COMPONENTS:
        return _COMPONENTS[class_name]
    found = f"a {class_name}" if class_name else "neither"
    raise FileNotFoundError(
        f"There is nothing to upload in {folder}: expected a pipeline ({_INDEX}), a LoRA ({_LORA}), or a "
        f"conditioner or autoencoder (config.json with {_WEIGHTS}.safetensors), found {found}."
    )


def class_of(folder: str | Path) -> str | None:
    """Name of the class of the pipeline, conditioner or autoencoder in a folder; None of a LoRA."""
    config = _INDEX if folder_kind(folder) == "pipeline" else "config.json"
    return _read(Path(folder) / config).get("_class_name")


def model_files(folder: str | Path) -> dict[str, Content]:
    """The files that make the model, by their path in the folder, and nothing else.

    Weights are safetensors, whole or in several files with their index, also of variants. Configs lose the note of
    where a component was loaded from (`_name_or_path`), a folder of this machine.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    if kind == "lora":
        scheduler = {_SCHEDULER: folder / _SCHEDULER} if sampler_of(folder) else {}
        return {name: _content(path) for name, path in {_LORA: folder / _LORA, **scheduler}.items()}
    if kind != "pipeline":
        paths = [
            folder / "config.json",
            *(path for path in _listed(folder) if path.name.startswith((_WEIGHTS, STATISTICS))),
        ]
        _check_weights(folder, paths)
        return {path.name: _content(path) for path in paths}
    files = {_INDEX: _content(folder / _INDEX)}
    for name in _components(folder):
        paths = _listed(folder / name)
        if not paths:
            raise FileNotFoundError(f"{folder} is not whole: {_INDEX} names {name!r}, which is not there.")
        _check_weights(folder / name, paths)
        files |= {f"{name}/{path.name}": _content(path) for path in paths}
    return files


def half_precision_files(folder: str | Path, variant: str, aside: str | Path) -> dict[str, Content]:
    """Write the weights of a model as `"fp16"` or `"bf16"`, and list the files that this adds to the model's.

    They are written to the folder `aside`, which has to last until the files are used.
    """
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if variant not in dtypes:
        raise ValueError(f"The variant is fp16 or bf16, not {variant}.")
    kind = folder_kind(folder)
    if kind == "lora":
        raise ValueError("A LoRA has no variants: it is cast to its pipeline's type when it is loaded.")
    model_class = getattr(diffusers if kind == "vae" else diffusers_dino, class_of(folder))
    model_class.from_pretrained(folder, dtype=dtypes[variant]).save_pretrained(aside, variant=variant)
    return {path: content for path, content in model_files(aside).items() if variant_of(Path(path).name) == variant}


def part_facts(folder: str | Path) -> dict[str, Any]:
    """What the configs say of preprocessing, encoder, autoencoder, UNet and schedule, by name."""
    folder = Path(folder)
    kind = folder_kind(folder)
    if kind == "lora":
        return _schedule_facts(folder) if sampler_of(folder) else {}
    places = {name: folder / name for name in _components(folder)} if kind == "pipeline" else {kind: folder}
    configs = {name: _read(place / "config.json") for name, place in places.items()}
    facts = _conditioner_facts(configs.get("conditioner", {})) | _vae_facts(configs.get("vae", {}))
    if "conditioner" in places and (known := TokenStatistics.load(places["conditioner"])):
        facts["familiarity"] = (
            f"mean and {len(known.directions)} directions of the tokens of {known.num_images} training images, "
            f"{len(known.distances)} distances of others; no image, and no tokens of one"
        )
    facts |= _prior_facts(configs.get("prior", {}))
    if unet := configs.get("unet"):
        side = unet["sample_size"]
        facts["UNet"] = f"{side} x {side} latents, levels of {unet['block_out_channels']}"
        facts["width of the condition"] = unet.get("cross_attention_dim")
    if transformer := configs.get("transformer"):
        facts |= _transformer_facts(transformer)
    denoiser = configs.get("unet") or configs.get("transformer") or {}
    facts |= _preparation_facts(denoiser)
    if (noted := noted_settings(denoiser)) is not None:
        facts["segments by default"] = (
            f"timestep {noted.timestep}, relative merge threshold {noted.merge_threshold:g}, self-attention of "
            f"{noted.joined_layers}"
        )
    if "scheduler" in places:
        facts |= _schedule_facts(folder)
    return facts


def sampler_of(folder: str | Path) -> str | None:
    """Name of the class of the scheduler beside a distilled LoRA; None of all else."""
    name = _read(Path(folder) / _SCHEDULER).get("_class_name") if folder_kind(folder) == "lora" else None
    return name if name in _OF_DISTILLED else None


def variant_of(name: str) -> str | None:
    """The variant of a weight file or its index: `fp16` of `model.fp16-00001-of-00002.safetensors`; None of others."""
    stem = name.removesuffix(".json").removesuffix(".safetensors").replace(".safetensors.index", "")
    _, _, variant = stem.partition(".")
    return variant.split("-")[0] or None


def _components(folder: Path) -> list[str]:
    return [
        name
        for name, value in _read(folder / _INDEX).items()
        if isinstance(value, list) and any(part is not None for part in value)
    ]


def _listed(folder: Path) -> list[Path]:
    """What `save_pretrained` writes into the folder of a component, also into that of Stable Diffusion's tokenizer."""
    paths = (path for path in sorted(folder.glob("*")) if path.is_file())
    return [path for path in paths if path.suffix in (".json", ".safetensors") or path.name == "merges.txt"]


def _check_weights(folder: Path, paths: list[Path]) -> None:
    names = {path.name for path in paths}
    for index in (path for path in paths if path.name.endswith(".json") and ".index." in path.name):
        if missing := sorted(set(_read(index).get("weight_map", {}).values()) - names):
            raise FileNotFoundError(f"{folder} is not whole: {index.name} names {missing[0]}, which is not there.")
    if "config.json" in names and not any(name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(f"{folder} holds no weights as safetensors: save the model again.")


def _content(path: Path) -> Content:
    config = _read(path) if path.suffix == ".json" else {}
    if "_name_or_path" not in config:
        return path
    del config["_name_or_path"]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _conditioner_facts(config: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for number, encoder in enumerate(config.get("encoders", ())):
        prefix = "encoder" if len(config["encoders"]) == 1 else f"encoder {number + 1}"
        revision = f" at {encoder['revision']}" if encoder.get("revision") else ""
        facts[prefix] = f"{encoder['source']}{revision} ({encoder['architecture']})"
        facts[f"{prefix} sees"] = f"the central square at {encoder['size']} px, {encoder['resample']}, antialiased"
        facts[f"{prefix} mean, std"] = [f"{value:g}" for value in (*encoder["mean"], *encoder["std"])]
    if facts:
        facts["condition tokens"] = config.get("tokens")
        facts["projected to"] = config.get("projection_dim")
    return facts


def _preparation_facts(unet: dict[str, Any]) -> dict[str, Any]:
    preparation = read_preparation(unet)
    if preparation is None:
        return {}
    size, borders = preparation.size, "cut off" if preparation.remove_borders else "left on"
    return {
        "images": f"borders {borders}, central square at {size} px, {preparation.resampling}, air is dark",
        "border tolerance": preparation.border_tolerance,
        "percent clipped at each end of the range": preparation.clip_percent,
    }


def _prior_facts(config: dict[str, Any]) -> dict[str, Any]:
    if not config:
        return {}
    known = config["conditioner"] or {}
    return {
        "tokens of": known.get("encoder"),
        "condition tokens": known.get("tokens"),
        "tokens": f"{config['num_tokens']} of width {config['token_dim']}",
        "labels": list(config["labels"]) or None,
        "labels without any other": list(config["exclusive_labels"]) or None,
        "numbers": list(config["numbers"] or ()) or None,
        "categories": [f"{name} ({', '.join(values)})" for name, values in (config["categories"] or {}).items()]
        or None,
        "text encoder": config["text_encoder"],
        "transformer": f"{config['num_layers']} blocks of width {config['width']}",
    }


def _schedule_facts(folder: Path) -> dict[str, Any]:
    schedule = _read(folder / _SCHEDULER)
    names = ("beta_schedule", "prediction_type", "num_train_timesteps", "rescale_betas_zero_snr", "shift")
    known = [f"{name} {schedule[name]}" for name in names if schedule.get(name) is not None]
    kind = str(schedule.get("_class_name"))
    facts: dict[str, Any] = {"schedule": ["flow matching"] * kind.startswith("FlowMatch") + known}
    if kind in _OF_DISTILLED:
        few = default_steps(getattr(diffusers, kind)())
        facts["sampling"] = f"{few} steps by default, at most {schedule['original_inference_steps']}"
    return facts


def _transformer_facts(config: dict[str, Any]) -> dict[str, Any]:
    side, patch, blocks = config["sample_size"], config["patch_size"], config["num_layers"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        "transformer": f"{config['_class_name']}, {side} x {side} latents in patches of {patch} x {patch}, {blocks} "
        f"blocks of width {width}",
        "width of the condition": family_named(config["_class_name"]).token_width(config),
    }


def _vae_facts(config: dict[str, Any]) -> dict[str, Any]:
    if not config:
        return {}
    levels = config.get("down_block_types") or config.get("encoder_block_out_channels") or ()
    return {
        "autoencoder": f"{config['_class_name']}, {config['in_channels']} channel(s) in [-1, 1], "
        f"{2 ** (len(levels) - 1)} px to a latent of {config['latent_channels']} channels",
        "scaling factor": config.get("scaling_factor"),
    }
