"""Short hashes that tell whether two things are the same: models, pipelines, lists of names."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import ConfigMixin

__all__ = ["as_json", "fingerprint_model", "fingerprint_pipeline", "hash_of", "own_config"]


def own_config(part: ConfigMixin) -> dict[str, Any]:
    """What a model or scheduler of diffusers was made with, without what diffusers notes beside it."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def fingerprint_pipeline(pipe: Any) -> dict[str, str]:
    """`fingerprint_model` of each model of a pipeline of diffusers, by the component's name, and what guides it."""
    parts = sorted(pipe.components.items())
    found = {name: fingerprint_model(part) for name, part in parts if isinstance(part, nn.Module)}
    if (guider := pipe.components.get("guider")) is not None:
        settings = json.dumps(as_json(own_config(guider)), sort_keys=True)
        found["guider"] = f"{type(guider).__name__} {hash_of(settings)[:16]}"
    return found


def fingerprint_model(model: nn.Module) -> str:
    """A hash of weights, settings and adapters of a model of diffusers or transformers: equal only for equal models.

    It ignores the names of weights, which libraries change between releases, settings at their defaults, to which
    releases add, and where the model was loaded from. It depends on the dtype of the weights: fingerprint a model
    before it is cast.
    """
    settings = _settings(model)
    for spec in settings.get("encoders", []):
        del spec["source"], spec["revision"]
    weights = sorted(hash_of(t.dtype, tuple(t.shape), t) for t in model.state_dict().values())
    layers = [part for part in model.modules() if hasattr(part, "lora_A")]  # whose scales are no weights
    adapters = [f"{part.scaling} {part.active_adapters} {part.disable_adapters}" for part in layers]
    return hash_of(type(model).__name__, json.dumps(settings, sort_keys=True), *weights, *adapters)[:16]


def _settings(model: nn.Module) -> dict[str, Any]:
    if hasattr(model.config, "to_diff_dict"):  # transformers; gives what differs from the defaults
        chosen = as_json(model.config.to_diff_dict())
        return {name: value for name, value in chosen.items() if name not in ("transformers_version", "dtype")}
    signature = inspect.signature(type(model).__init__).parameters
    defaults = {name: as_json(parameter.default) for name, parameter in signature.items()}
    return {
        name: value
        for name, value in as_json(dict(model.config)).items()
        if not name.startswith("_") and (name not in defaults or value != defaults[name])
    }


def hash_of(*parts: Any) -> str:
    """SHA-256 of tensors' bytes, and of all else as text."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{part}\x1f".encode())
    return digest.hexdigest()


def as_json(value: Any) -> Any:
    """A value as JSON gives it back, so that a tuple equals the list it becomes."""
    return json.loads(json.dumps(value, default=str))
