"""Read an encoder's checkpoint, from a folder or the Hub, with the preprocessing that belongs to it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .model import (
    RESAMPLINGS,
    SUPPORTED,
    TRANSFORMERS_FAMILIES,
    EncoderSpec,
    check_size,
    describe_model,
    is_timm_family,
)
from .storage import quiet_transformers

__all__ = ["load_encoder"]

_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_PIL_RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
logger = logging.getLogger(__name__)


def load_encoder(
    name_or_path: str | os.PathLike[str], *, size: int | None = None, revision: str | None = None, **hub: Any
) -> tuple[EncoderSpec, nn.Module]:
    """Load a checkpoint of transformers or timm in float32: what the encoder is, and the network with its weights.

    Args:
        name_or_path: A folder, an id on the Hub (timm's prefixes `hf-hub:` and `local-dir:` are understood), or the
            name of a model of timm.
        size: Side in pixels of the images to encode, instead of the checkpoint's own.
        revision: Branch, tag or commit on the Hub.
        hub: `token`, `cache_dir` and `local_files_only` of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If the name is neither a folder nor an id, the architecture is not supported, weights are missing,
            the preprocessing cannot be reproduced, or the size is not a multiple of the patch.
        FileNotFoundError: If the Hub does not give the checkpoint, or it holds no config, no preprocessing, or no
            weights in safetensors.
    """
    name = _hub_id(os.fspath(name_or_path))
    folder, commit = _fetch(name, _CONFIGS, revision, hub)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is not an encoder's checkpoint: it has no {path.name}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    family = config.get("model_type")
    if family in TRANSFORMERS_FAMILIES:
        load = _load_transformers
    elif family is None and is_timm_family(config.get("architecture", "")):
        load = _load_timm
    else:
        found = family or config.get("architecture") or "no architecture"
        raise ValueError(f"The encoder {name!r} is of an unknown family ({found}). Supported: {SUPPORTED}.")
    folder, _ = _fetch(name, _CONFIGS + _WEIGHTS, commit or revision, hub)
    _check_weights(name, folder)
    origin = {"source": name if commit else folder.resolve().name, "revision": commit}
    try:
        spec, model = load(folder, config, size, origin)
    except SafetensorError as error:
        raise ValueError(f"The weights of the encoder {name!r} are corrupt, fetch them again: {error}.") from error
    return spec, model.eval()


def _hub_id(name: str) -> str:
    for prefix in _TIMM_PREFIXES:
        name = name.removeprefix(prefix)
    if "/" in name or os.path.isdir(name):
        return name
    import timm

    if timm.is_model(name.split(".")[0]):
        config = timm.get_pretrained_cfg(name)
        if config is None or config.hf_hub_id is None:
            raise ValueError(f"timm has no weights on the Hub for {name!r}: give a name with its tag, or a folder.")
        return config.hf_hub_id if config.hf_hub_id != "timm/" else f"timm/{config.architecture}.{config.tag}"
    return name


def _fetch(name: str, patterns: list[str], revision: str | None, hub: Mapping[str, Any]) -> tuple[Path, str | None]:
    """The folder with the files of these patterns, and its commit if it is from the Hub."""
    if os.path.isdir(name):
        return Path(name), None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub))
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor an id on the Hub.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is not a folder here, and the Hub gave no encoder for it: {error}"
        ) from error
    return folder, folder.name


def _check_weights(name: str, folder: Path) -> None:
    if any((folder / file).is_file() for file in _WEIGHTS[:2]):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    held = f"it holds {', '.join(pickles)}, a pickle that could run any code" if pickles else "it holds none"
    raise FileNotFoundError(
        f"The encoder {name!r} needs its weights as model.safetensors; {held}. If you trust them, load them once with "
        "the library that wrote them and save them again as safetensors."
    )


def _load_transformers(
    folder: Path, config: Mapping[str, Any], size: int | None, origin: dict[str, Any]
) -> tuple[EncoderSpec, nn.Module]:
    preprocessing = _processor_preprocessing(folder, size)
    model_class = TRANSFORMERS_FAMILIES[config["model_type"]][1]
    check_size(
        preprocessing["size"], config.get("patch_size", model_class.config_class().patch_size), origin["source"]
    )
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    missing = set(report["missing_keys"])
    pooler = {key for key in missing if key.startswith("pooler.")}
    if pooler:  # transformers made one at random
        model.pooler = None
    # The mask token serves only masked training.
    if absent := sorted(key for key in missing - pooler if not key.endswith("mask_token")):
        raise ValueError(f"The checkpoint {origin['source']!r} lacks weights of its network: {', '.join(absent[:5])}.")
    return EncoderSpec(**describe_model(model), **preprocessing, **origin), model


def _load_timm(
    folder: Path, config: Mapping[str, Any], size: int | None, origin: dict[str, Any]
) -> tuple[EncoderSpec, nn.Module]:
    import timm

    pretrained_cfg = config.get("pretrained_cfg", config)
    data = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
    size = _square_side(data["input_size"][1:]) if size is None else size
    weights = _timm_weights(folder, pretrained_cfg)
    try:
        model = timm.create_model(
            f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=weights, num_classes=0, img_size=size
        )
    except RuntimeError as error:
        raise ValueError(f"The checkpoint {origin['source']!r} does not fill its network: {error}") from error
    del model.pretrained_cfg["state_dict"]
    check_size(size, model.patch_embed.patch_size[0], origin["source"])
    arguments = {**config.get("model_args", {}), "img_size": size}
    return (
        EncoderSpec(
            **describe_model(model, arguments),
            size=size,
            resample=_resampling(data["interpolation"]),
            mean=[float(v) for v in data["mean"]],
            std=[float(v) for v in data["std"]],
            **origin,
        ),
        model,
    )


def _timm_weights(folder: Path, pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What points timm at the safetensors; its own search would also take a pickle.

    timm is strict about missing weights only if there is no classifier to drop, so there is none to begin with.
    """
    names = pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(heads)}
    return {"source": "", "state_dict": kept, "num_classes": 0, "custom_load": False}


def _processor_preprocessing(folder: Path, size: int | None) -> dict[str, Any]:
    """`size`, `resample`, `mean` and `std` of a checkpoint's image processor."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json that names its size, mean and std. Add the one the encoder was "
            "trained with, or build the model yourself and use `from_model(model, size=..., mean=..., std=...)`."
        ) from error
    # The network sees (255 x * rescale_factor - mean) / std for x in [0, 1].
    scale = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1)
    normalize = processor.get("do_normalize", True)
    return {
        "size": _processor_size(processor) if size is None else size,
        "resample": _resampling(_PIL_RESAMPLINGS.get(int(processor.get("resample", 2)))),
        "mean": [v / scale for v in _three(processor["image_mean"] if normalize else 0.0)],
        "std": [v / scale for v in _three(processor["image_std"] if normalize else 1.0)],
    }


def _processor_size(processor: Mapping[str, Any]) -> int:
    cropped = processor.get("do_center_crop") and processor.get("crop_size")
    size = processor["crop_size"] if cropped else processor.get("size")
    if isinstance(size, int):
        return size
    if size and "shortest_edge" in size:
        return int(size["shortest_edge"])
    if size and "height" in size and "width" in size:
        return _square_side((size["height"], size["width"]))
    raise ValueError(f"The image processor's size {size!r} is not a square's: give `size` in pixels.")


def _square_side(sides: tuple[int, ...]) -> int:
    if len(set(sides)) != 1:
        raise ValueError(f"The checkpoint's images are {tuple(sides)}, not square: give `size` in pixels.")
    return int(sides[0])


def _resampling(name: str | None) -> str:
    """torch antialiases only bilinear and bicubic; bicubic is the nearest to the longer filters."""
    if name in RESAMPLINGS:
        return name
    logger.warning("The checkpoint's resampling (%s) has no differentiable counterpart: bicubic is used.", name)
    return "bicubic"


def _three(value: float | list[float]) -> list[float]:
    values = [value] if isinstance(value, (int, float)) else list(value)
    return [float(v) for v in (values * 3 if len(values) == 1 else values)]
