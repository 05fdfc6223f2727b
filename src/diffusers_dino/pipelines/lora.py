"""Low-rank adapters of the UNet, in the file format that diffusers' Stable Diffusion pipelines read and write."""

from __future__ import annotations

import os
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn

from ..extras import require

__all__ = ["UNetLoraLoaderMixin"]


class UNetLoraLoaderMixin(LoraBaseMixin):
    """Load, save, fuse, weigh and combine LoRA of the UNet.

    diffusers' own mixin for this UNet also expects a text encoder; this one has what remains without it.
    `set_adapters`, `delete_adapters`, `disable_lora`, `unload_lora_weights` and their like are the base class's.
    """

    _lora_loadable_modules = ["unet"]  # noqa: RUF012 - the base class reads it as a plain class attribute
    unet_name = "unet"

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to the UNet; errors are as in `lora_state_dict`, and a ValueError if it is of another UNet.

        Args:
            pretrained_model_name_or_path_or_dict: A Hub id, a folder or file of safetensors, or a state dict.
            adapter_name: Name for `set_adapters` and `fuse_lora`; by default `default_{i}`.
            hotswap: Replace the loaded adapter of that name in place.
            kwargs: As in `lora_state_dict`; also `low_cpu_mem_usage`.
        """
        require("peft", "train", "LoRA needs peft")
        if self.unet is None:
            raise ValueError("This pipeline has no unet to load a LoRA into.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        state_dict, network_alphas, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        weights = {name: weight for name, weight in state_dict.items() if name.startswith(f"{self.unet_name}.")}
        if not weights or not all("lora" in name for name in weights):
            raise ValueError(
                "There are no LoRA weights of a UNet in this file: their names start with 'unet.' and contain 'lora', "
                f"but the first names found are {sorted(state_dict)[:3]}."
            )
        _check_fit(self.unet, weights, f"{self.unet_name}.")
        self.unet.load_lora_adapter(
            weights,
            prefix=self.unet_name,
            network_alphas=network_alphas,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

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
            ValueError: If the file is corrupt.
            FileNotFoundError: If it is neither a folder or file nor an id on the Hub.
        """
        kwargs.setdefault("use_safetensors", True)
        source = pretrained_model_name_or_path_or_dict
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
        except SafetensorError as error:
            raise ValueError(f"The LoRA in {str(source)!r} is corrupt, fetch it again: {error}.") from error

    @classmethod
    def save_lora_weights(
        cls, save_directory: str | os.PathLike, unet_lora_layers: dict[str, nn.Module | Tensor], **kwargs: Any
    ) -> None:
        """Write an adapter as `pytorch_lora_weights.safetensors`.

        Args:
            save_directory: Made if it does not exist.
            unet_lora_layers: From `convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))`.
            kwargs: As in diffusers: `weight_name`, `is_main_process` (False on all but one process of a distributed
                run), `unet_lora_adapter_metadata` (the adapter's `LoraConfig`, by which it is rebuilt exactly), ...
        """
        if os.path.isfile(save_directory):  # diffusers would log it, and write nothing
            raise NotADirectoryError(f"A LoRA is saved to a folder, and {save_directory} is a file.")
        StableDiffusionLoraLoaderMixin.save_lora_weights(save_directory, unet_lora_layers=unet_lora_layers, **kwargs)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Merge adapters into the UNet's weights, so that they cost nothing at sampling; `unfuse_lora` reverts it.

        `lora_scale` is their strength, `safe_fusing` refuses to merge weights that become NaN, `adapter_names` are by
        default all active ones, and `components` are `["unet"]`.
        """
        super().fuse_lora(components or [self.unet_name], lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take merged adapters out of the UNet's weights again."""
        super().unfuse_lora(components or [self.unet_name], **kwargs)


def _check_fit(unet: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Refuse adapters of another UNet in one sentence, where peft would take a part of them or fill a page."""
    layers = dict(unet.named_modules())
    own = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    for name, weight in convert_unet_state_dict_to_peft(own).items():
        path, _, matrix = name.partition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            continue  # magnitudes of DoRA, scales
        layer = getattr(layers.get(path), "base_layer", layers.get(path))
        is_input = matrix == "A.weight"  # (r, inputs), and (outputs, r)
        side = "in" if is_input else "out"
        size = getattr(layer, f"{side}_features", getattr(layer, f"{side}_channels", None))
        if weight.shape[int(is_input)] != size:
            found = "none of that name" if size is None else f"one with {size} {side}puts"
            raise ValueError(
                f"This LoRA is of another UNet: it has {weight.shape[int(is_input)]} {side}puts in the layer {path}, "
                f"and here is {found}. Load it into the pipeline that it was trained on."
            )
