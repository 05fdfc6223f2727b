"""Saved encoders that outlive a release of transformers.

transformers renames the layers inside its models now and then (DINOv2's `attention.attention.query` became
`attention.q_proj`), and converts files on the way in and out, so that those on the Hub keep their names. What holds
such a model has to do the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ..registration import ModelMixin  # diffusers', which knows this library from then on

__all__ = ["LastingModelMixin", "quiet_transformers"]


class LastingModelMixin(ModelMixin):
    """A model of diffusers that holds models of transformers, saves them under lasting names, and loads whole."""

    _saving = False  # whether `save_pretrained` is asking for the state dict

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote, with the options of diffusers' `ModelMixin.from_pretrained`.

        Weights are read from safetensors unless `use_safetensors=False` is given. Missing tensors raise a ValueError,
        where diffusers would warn and go on with what an empty model holds.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)  # else diffusers looks for a pickle where there is none
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} is incomplete: {len(missing)} tensors are missing, for example "
                f"{missing[0]}. Save or fetch it again; if it was saved in several files by another release of "
                "transformers, load it with that one."
            )
        return (model, info) if with_info else model

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines pass on only the options that a signature names
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """Save config and weights (safetensors), with the options of diffusers' `ModelMixin.save_pretrained`.

        Weights of transformers' models are stored under the names that they have on the Hub, which no release of
        transformers changes. In several files (`max_shard_size`) they keep the names of the installed release, because
        diffusers offers no place to convert those.
        """
        sharded = split_torch_state_dict_into_shards(self.state_dict(), max_shard_size=max_shard_size).is_sharded
        self._saving = not sharded and not getattr(self, "is_quantized", False)
        try:
            # pipelines of diffusers give the middle two if they find them in the signature
            options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
            super().save_pretrained(save_directory, **options, **kwargs)
        finally:
            self._saving = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As of any module, but for `save_pretrained`."""
        state = super().state_dict(*args, **kwargs)
        return self._renamed(state, revert_weight_conversion) if self._saving else state

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        """diffusers' hook for what it read from a file, to be changed in place."""
        renamed = self._renamed(state_dict, _to_installed_names)
        state_dict.clear()
        state_dict.update(renamed)

    def _renamed(self, state: Mapping[str, Tensor], rename: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        renamed = dict(state)
        done: tuple[str, ...] = ()
        for path, module in self.named_modules():
            # models of transformers are made of others, which the outermost one converts
            if isinstance(module, transformers.PreTrainedModel) and not path.startswith(done):
                prefix = f"{path}."
                own = {name[len(prefix) :]: renamed.pop(name) for name in state if name.startswith(prefix)}
                renamed |= {prefix + name: tensor for name, tensor in rename(module, own).items()}
                done += (prefix,)
        return renamed


def _to_installed_names(model: transformers.PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that the state lacks stay lacking, for the caller to judge."""
    quantized = not all(tensor.is_floating_point() for tensor in state.values())
    if quantized or not state or set(state) == set(model.state_dict()):
        return state
    options = {"add_pooling_layer": model.pooler is not None} if isinstance(model, transformers.ViTModel) else {}
    with quiet_transformers():
        converted, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            dtype=next(iter(state.values())).dtype,
            output_loading_info=True,
            **options,
        )
    missing = set(report["missing_keys"])
    return {name: tensor for name, tensor in converted.state_dict().items() if name not in missing}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its table of missing weights, which the caller judges itself."""
    logging = transformers.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
