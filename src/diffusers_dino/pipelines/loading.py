"""How pipelines come by their components: read from safetensors, or shared with another pipeline."""

from __future__ import annotations

import os
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ComponentLoadingMixin"]


class ComponentLoadingMixin:
    """`from_pretrained` and `from_pipe`: pickles are read only if asked for, parts are shared as they are."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline from a folder or the Hub, from safetensors unless `use_safetensors=False` is given.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a repository `"org/name"`.
            kwargs: As in `DiffusionPipeline.from_pretrained`: `dtype`, `revision`, `variant`, `cache_dir`,
                `local_files_only`, `quantization_config`, components by name, ...
        """
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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
        arguments = signature(cls).parameters.values()
        missing = {each.name for each in arguments if each.default is Parameter.empty} - set(shared)
        if missing:
            raise ValueError(
                f"{type(pipeline).__name__} has no {' and no '.join(sorted(missing))}, which a {cls.__name__} needs: "
                "give it by name."
            )
        made = cls(**shared)
        return made if dtype is None else made.to(dtype=dtype)
