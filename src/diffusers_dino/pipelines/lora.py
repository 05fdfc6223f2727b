"""The denoiser of a pipeline and its low-rank adapters, in the file formats of diffusers' own pipelines."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn

from ..denoisers import family_of, title_of, unwrapped
from ..extras import require
from .checks import check_number
from .turns import takes_the_denoiser

__all__ = ["DenoiserMixin", "save_adapter"]

_FORMATS = {"unet": StableDiffusionLoraLoaderMixin, "transformer": SD3LoraLoaderMixin}  # of files, by component
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError)  # what diffusers and peft raise at odd content


class DenoiserMixin(StableDiffusionMixin, LoraBaseMixin):
    """The denoiser of a pipeline, its `unet` or `transformer`, and LoRA of it: load, save, fuse, weigh and combine.

    diffusers' own mixins also expect a text encoder and a UNet; this one has what remains without them.
    `set_adapters`, `delete_adapters`, `disable_lora`, `unload_lora_weights` and their like are the base class's.
    """

    _lora_loadable_modules = ["unet", "transformer"]  # noqa: RUF012 - the base class reads a plain class attribute
    unet: nn.Module | None
    transformer: nn.Module | None

    @property
    def denoiser(self) -> nn.Module | None:
        """The model that denoises: the `transformer` where there is one, else the `unet`."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def denoiser_name(self) -> str:
        """What the component is called: `"unet"` or `"transformer"`."""
        return "unet" if self.transformer is None else "transformer"

    def enable_freeu(self, *args: float, **kwargs: float) -> None:
        """As in diffusers; a ValueError without a UNet, whose skip connections it weighs."""
        if self.unet is None:
            raise ValueError("FreeU weighs the skip connections of a UNet, and this pipeline has none.")
        super().enable_freeu(*args, **kwargs)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As in diffusers; a ValueError for the UNet of a pipeline that has none."""
        if unet and self.unet is None:
            raise ValueError("There is no unet to fuse: call it with unet=False, or on the transformer itself.")
        super().fuse_qkv_projections(unet, vae)

    set_adapters = takes_the_denoiser(LoraBaseMixin.set_adapters)
    delete_adapters = takes_the_denoiser(LoraBaseMixin.delete_adapters)
    disable_lora = takes_the_denoiser(LoraBaseMixin.disable_lora)
    enable_lora = takes_the_denoiser(LoraBaseMixin.enable_lora)
    unload_lora_weights = takes_the_denoiser(LoraBaseMixin.unload_lora_weights)

    @takes_the_denoiser
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to the denoiser.

        Errors are as in `lora_state_dict`, and a ValueError if it is of another model, not whole, or holds NaN or
        infinity.

        Args:
            pretrained_model_name_or_path_or_dict: A Hub id, a folder or file of safetensors, or a state dict.
            adapter_name: Name for `set_adapters` and `fuse_lora`; by default `default_{i}`.
            hotswap: Replace the loaded adapter of that name in place.
            kwargs: As in `lora_state_dict`; also `low_cpu_mem_usage`.
        """
        require("peft", "train", "LoRA needs peft")
        if self.denoiser is None:
            raise ValueError("This pipeline has no unet to load a LoRA into, and no transformer.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        state_dict, network_alphas, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        name, denoiser = self.denoiser_name, self.denoiser
        weights = {key: weight for key, weight in state_dict.items() if key.startswith(f"{name}.")}
        if not weights or not all("lora" in key for key in weights):
            raise ValueError(
                f"There are no LoRA weights of a {title_of(denoiser)} in this file: their names start with '{name}.' "
                f"and contain 'lora', but the first names found are {sorted(state_dict)[:3]}."
            )
        _check_numbers(weights, network_alphas, metadata, f"{name}.")
        _check_fit(denoiser, weights, f"{name}.")
        try:
            denoiser.load_lora_adapter(
                weights,
                prefix=name,
                network_alphas=network_alphas,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
        except (RuntimeError, re.error, *_MALFORMED) as error:
            if not getattr(denoiser, "peft_config", None):
                denoiser.unload_lora()  # else layers would stay wrapped, and be saved under other names
            if isinstance(error, RuntimeError) and "in loading state_dict" not in str(error):
                raise  # no memory, say
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"This LoRA does not fit what its metadata say of it ({reason} ...). Save it anew, or give its "
                "weights as a dict."
            ) from error

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor], **kwargs: Any
    ) -> tuple:
        """Read a LoRA file as diffusers does, from safetensors unless `use_safetensors=False` is given.

        Args:
            pretrained_model_name_or_path_or_dict: As in `load_lora_weights`.
            kwargs: `weight_name`, `revision`, `subfolder`, `cache_dir`, `local_files_only`, ... of diffusers.

        Returns:
            State dict and network alphas, and with `return_lora_metadata=True` the metadata too.

        Raises:
            TypeError: If it is none of these.
            ValueError: If the file is corrupt.
            FileNotFoundError: If it is neither a folder or file nor an id on the Hub.
        """
        kwargs.setdefault("use_safetensors", True)
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, (dict, str, os.PathLike)):
            raise TypeError(f"A LoRA is a folder, a file, an id on the Hub or a dict, not a {type(source).__name__}.")
        if not isinstance(source, dict) and not os.path.exists(source):
            try:
                validate_repo_id(source)
            except HFValidationError as error:  # also of a `Path`
                raise FileNotFoundError(
                    f"{str(source)!r} is neither a folder or file nor an id on the Hub."
                ) from error
            if kwargs["use_safetensors"] and (kwargs.get("local_files_only") or HF_HUB_OFFLINE):
                # diffusers would ask the Hub for the file's name
                kwargs["weight_name"] = kwargs.get("weight_name") or LORA_WEIGHT_NAME_SAFE
        try:
            return StableDiffusionLoraLoaderMixin.lora_state_dict(source, **kwargs)
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, *_MALFORMED) as error:
            named = "this dict" if isinstance(source, dict) else repr(str(source))
            reason = f"{type(error).__name__}: {error}" if isinstance(error, _MALFORMED) else str(error)
            raise ValueError(f"The LoRA in {named} is corrupt, fetch it again: {reason}.") from error

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: dict[str, nn.Module | Tensor] | None = None,
        transformer_lora_layers: dict[str, nn.Module | Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an adapter as `pytorch_lora_weights.safetensors`.

        Args:
            save_directory: Made if it does not exist.
            unet_lora_layers: From `convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))`.
            transformer_lora_layers: In its place, from `get_peft_model_state_dict(transformer)`.
            kwargs: As in diffusers: `weight_name`, `is_main_process` (False on all but one process of a distributed
                run), `unet_lora_adapter_metadata` or `transformer_lora_adapter_metadata` (the adapter's `LoraConfig`,
                by which it is rebuilt exactly), ...
        """
        if os.path.isfile(save_directory):  # diffusers would log it, and write nothing
            raise NotADirectoryError(f"A LoRA is saved to a folder, and {save_directory} is a file.")
        layers = {"unet": unet_lora_layers, "transformer": transformer_lora_layers}
        given = [name for name, each in layers.items() if each is not None]
        if len(given) != 1:
            raise ValueError("Give either `unet_lora_layers` or `transformer_lora_layers`.")
        _FORMATS[given[0]].save_lora_weights(save_directory, **{f"{given[0]}_lora_layers": layers[given[0]]}, **kwargs)

    @takes_the_denoiser
    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Merge adapters into the denoiser's weights, so that they cost nothing at sampling; `unfuse_lora` reverts it.

        A ValueError, and nothing is merged, if what is to be added to a weight is not finite.

        `lora_scale` is their strength, `safe_fusing` refuses to merge weights that become NaN, `adapter_names` are by
        default all active ones, and `components` are `["unet"]` or `["transformer"]`.
        """
        check_number(-math.inf, lora_scale=lora_scale)
        tuners = require("peft.tuners.tuners_utils", "train", "LoRA needs peft")
        for path, layer in self.denoiser.named_modules() if self.denoiser is not None else ():
            if not isinstance(layer, tuners.BaseTunerLayer):
                continue
            for name in set(adapter_names or layer.active_adapters) & set(layer.scaling):
                added = layer.get_delta_weight(name) * lora_scale
                if not added.is_meta and not torch.isfinite(added).all():
                    raise ValueError(
                        f"Adapter {name!r} would make weights of {path} infinite or NaN, and unfusing would not bring "
                        "them back: give a lower lora_scale or weight of the adapter, or train it anew."
                    )
        super().fuse_lora(components or [self.denoiser_name], lora_scale, safe_fusing, adapter_names, **kwargs)

    @takes_the_denoiser
    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take merged adapters out of the denoiser's weights again."""
        super().unfuse_lora(components or [self.denoiser_name], **kwargs)


def save_adapter(denoiser: ModelMixin, folder: str | os.PathLike) -> None:
    """Write the adapter of a denoiser, with weights as they are, as `load_lora_weights` of its pipeline reads it."""
    from peft import get_peft_model_state_dict

    layers, component = get_peft_model_state_dict(denoiser), family_of(denoiser).component
    layers = convert_state_dict_to_diffusers(layers) if component == "unet" else layers
    config = denoiser.peft_config["default"].to_dict()  # without it, loading takes the rank for alpha
    config["target_modules"] = sorted(config["target_modules"])  # a set is written in any order
    DenoiserMixin.save_lora_weights(
        folder, **{f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": config}
    )


def _check_numbers(
    weights: Mapping[str, Any], alphas: Mapping[str, float] | None, metadata: Mapping[str, Any] | None, prefix: str
) -> None:
    """Refuse weights and scales that are not finite numbers: fused, they would spoil the model for good."""
    if not isinstance(metadata or {}, Mapping):
        raise ValueError(f"The metadata of this LoRA must be a dict, got {metadata!r}.")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"Weights of a LoRA are floating tensors, and {name} is {kind}.")
        if not torch.isfinite(weight.float()).all():
            raise ValueError(f"This LoRA contains NaN or infinity, in {name}: train it anew, or fetch it again.")
    said = {name.removeprefix(prefix): value for name, value in (metadata or {}).items() if name.startswith(prefix)}
    if said.get("modules_to_save"):
        raise ValueError(
            f"This LoRA replaces whole layers ({said['modules_to_save']}), which cannot be loaded: train it without "
            "`modules_to_save`."
        )
    numbers = {name: said[name] for name in ("r", "lora_alpha") if name in said} | dict(alphas or {})
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(said.get(name) or {}, dict):
            raise ValueError(f"`{name}` of a LoRA's metadata must be a dict, got {said[name]!r}.")
        numbers |= {f"{name}[{layer!r}]": value for layer, value in (said.get(name) or {}).items()}
    for name, value in numbers.items():
        check_number(-math.inf, **{name: value})
        if name.startswith("r") and not (isinstance(value, Integral) and value > 0):
            raise ValueError(f"`{name}` of a LoRA's metadata must be a positive integer, got {value!r}.")


def _check_fit(denoiser: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse adapters of another model in one sentence, where peft would take a part of them or fill a page."""
    layers = dict(unwrapped(denoiser).named_modules())
    own = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    matrices: dict[str, dict[str, Tensor]] = {}
    for name, weight in convert_unet_state_dict_to_peft(own).items():
        path, _, matrix = name.partition(".lora_")
        if matrix in ("A.weight", "B.weight"):  # others are magnitudes of DoRA, scales
            matrices.setdefault(path, {})[matrix[0]] = weight
    if not matrices:
        raise ValueError(f"There are no matrices of a LoRA among these weights, such as {next(iter(weights))}.")
    for path, pair in matrices.items():
        layer = getattr(layers.get(path), "base_layer", layers.get(path))
        ranks = {weight.shape[matrix == "B"] if weight.ndim > 1 else 0 for matrix, weight in pair.items()}
        axes = {weight.ndim for weight in pair.values()} | ({layer.weight.ndim} if hasattr(layer, "weight") else set())
        if len(pair) != 2 or len(ranks) != 1 or 0 in ranks or len(axes) != 1:
            shapes = " and ".join(str(tuple(weight.shape)) for weight in pair.values())
            raise ValueError(
                f"This LoRA is not whole: a layer needs two matrices of one rank, and {path} has {shapes}. Fetch it "
                "again, or save it anew."
            )
        for matrix, weight in pair.items():
            side, count = ("in", weight.shape[1]) if matrix == "A" else ("out", weight.shape[0])
            size = getattr(layer, f"{side}_features", getattr(layer, f"{side}_channels", None))
            if count != size:
                found = "none of that name" if size is None else f"one with {size} {side}puts"
                raise ValueError(
                    f"This LoRA is of another {title_of(denoiser)}: it has {count} {side}puts in the layer {path}, "
                    f"and here is {found}. Load it into the pipeline that it was trained on."
                )
