"""How pipelines come by their components: read from safetensors and checked, or shared with another pipeline."""

from __future__ import annotations

import json
import math
import os
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from ..denoisers import title_of
from ..familiarity import fetch_statistics

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..conditioner import DinoImageConditioner

__all__ = ["ComponentLoadingMixin", "check_condition", "note_condition"]

_NOTE = "_condition"  # in the denoiser's config, which diffusers keeps and passes on without reading it


class ComponentLoadingMixin:
    """`from_pretrained` and `from_pipe`: pickles are read only if asked for, parts are shared as they are."""

    _unlisted_if_none: tuple[str, ...] = ()  # components that `model_index.json` does not name where they are None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline from a folder or the Hub, from safetensors unless `use_safetensors=False` is given.

        A ValueError if conditioner and denoiser do not belong together, as where a new training there was killed.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a repository `"org/name"`.
            kwargs: As in `DiffusionPipeline.from_pretrained`: `dtype`, `revision`, `variant`, `cache_dir`,
                `local_files_only`, `quantization_config`, components by name, ...
        """
        kwargs.setdefault("use_safetensors", True)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if isinstance(pipe, cls) and not {"conditioner", "unet", "transformer"} & set(kwargs):
            conditioner = pipe.components.get("conditioner")
            check_condition(getattr(pipe, "denoiser", None), conditioner, pretrained_model_name_or_path)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """As in diffusers, and the statistics of tokens that lie beside a conditioner's weights."""
        folder = super().download(pretrained_model_name, **kwargs)
        if "conditioner" in cls._get_signature_keys(cls)[0]:
            fetch_statistics(pretrained_model_name, "conditioner", kwargs)
        return folder

    @wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; notes that conditioner and denoiser belong together. ValueError if a LoRA is loaded."""
        for name, part in self.components.items():
            if getattr(part, "peft_config", None):  # diffusers would write names of weights that it cannot load
                raise ValueError(
                    f"The {name} has LoRA adapters, which are files of their own (save_lora_weights). Call "
                    "unload_lora_weights() before you save the pipeline: what fuse_lora() has merged stays."
                )
            if part is not None and tuple(self.config[name]) == (None, None):  # was set as an attribute
                self.register_modules(**{name: part})
        note_condition(getattr(self, "denoiser", None), self.components.get("conditioner"))
        super().save_pretrained(*args, **kwargs)

    def to_json_string(self) -> str:
        """As in diffusers, without the components in `_unlisted_if_none` that this pipeline has not."""
        index = json.loads(super().to_json_string())
        absent = [name for name in self._unlisted_if_none if index.get(name) == [None, None]]
        return json.dumps({name: index[name] for name in index if name not in absent}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Share the components of another pipeline, with their adapters.

        diffusers' own `from_pipe` casts the shared components to float32 unless another type is given; here they
        keep their type, and the other pipeline its memory.

        Args:
            pipeline: Any pipeline that has components of these names, such as a Stable Diffusion.
            kwargs: Components in place of its own or missing ones, by name; `dtype` casts them all.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        names, _ = cls._get_signature_keys(cls)
        shared = {name: part for name, part in pipeline.components.items() if name in names} | kwargs
        arguments = signature(cls).parameters
        needed = {name for name, each in arguments.items() if each.default is Parameter.empty}
        needed |= {"scheduler"} | ({"unet"} if shared.get("transformer") is None else set())
        missing = (needed & set(arguments)) - set(shared)
        if missing:
            raise ValueError(
                f"{type(pipeline).__name__} has no {' and no '.join(sorted(missing))}, which a {cls.__name__} needs: "
                "give it by name."
            )
        made = cls(**shared)
        return made if dtype is None else made.to(dtype=dtype)


def note_condition(denoiser: nn.Module | None, conditioner: DinoImageConditioner | None) -> None:
    """Note the layout of the condition in the config of the denoiser that is trained on it, for `check_condition`.

    It is saved with the denoiser. Without a conditioner, an earlier note stays.
    """
    if denoiser is not None and conditioner is not None:
        denoiser.register_to_config(**{_NOTE: conditioner.layout})


def check_condition(
    denoiser: nn.Module | None, conditioner: DinoImageConditioner | None, place: str | os.PathLike
) -> None:
    """Refuse with a ValueError a denoiser that was trained on other tokens than a conditioner makes.

    Models from before there were such notes are not checked. Statistics may differ by a thousandth, as they do where
    two devices compute them.
    """
    noted = denoiser.config.get(_NOTE) if denoiser is not None else None
    if noted is None or conditioner is None:
        return
    here = conditioner.layout
    try:
        belong = noted["settings"] == here["settings"] and all(
            math.isclose(*pair, rel_tol=1e-3) for pair in zip(noted["statistics"], here["statistics"], strict=True)
        )
    except (KeyError, TypeError, ValueError):  # edited
        belong = False
    if not belong:
        title = title_of(denoiser)
        raise ValueError(
            f"The conditioner and the {title} in {place} do not belong together: the {title} was trained on other "
            "condition tokens. A new training may have begun in this folder and not ended: let it end, or train into "
            "another folder. To put parts together on purpose, give the conditioner by name: conditioner=..."
        )
