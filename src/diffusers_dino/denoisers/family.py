"""What pipelines and training ask of a kind of denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

__all__ = ["Config", "Family", "unwrapped", "width_of", "with_lora_methods"]

Config = Mapping[str, Any]


class Family:
    """How tokens, time and latents go into models of one class of diffusers, and which of them fit.

    It holds no model and no state. What is said here holds of most transformers.

    Attributes:
        kind: The class of the models.
        component: What diffusers' pipelines call it.
        title: What messages call it.
        token_field: The number in its config that is the width of the condition tokens.
        latent_sides: Numbers in its config that are the channels of the latents.
        flow: Whether a new model is trained by flow matching unless something else is asked for.
        lora_targets: Names of the layers that a LoRA is added to.
        zero_layers: Ends of the names of layers that start at zero in a new transformer.
        small_layers: Parts of the names of those that start small: they embed time and condition.
        attention_argument: What its models call `attention_kwargs`.
        takes_scale: Whether `attention_kwargs={"scale": s}` weighs a LoRA.
    """

    kind: ClassVar[type[ModelMixin]]
    component: ClassVar[str] = "transformer"
    title: ClassVar[str] = "transformer"
    token_field: ClassVar[str]
    latent_sides: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels")
    flow: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    zero_layers: ClassVar[tuple[str, ...]] = ()
    small_layers: ClassVar[tuple[str, ...]] = ("embedder",)
    attention_argument: ClassVar[str] = "cross_attention_kwargs"
    takes_scale: ClassVar[bool] = True

    def predict(
        self,
        model: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        tokens: Tensor,
        guidance: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """What the model predicts from noisy latents.

        Args:
            model: The model, which may be wrapped for training.
            latents: `(B, L, h, w)`.
            timesteps: `(B,)`, of a flow its time times the scheduler's `num_train_timesteps`.
            tokens: The condition `(B, S, D)`, class token first.
            guidance: The embedded guidance scale `(B, W)` of a distilled UNet.
            attention_kwargs: For the attention processors; `{"scale": s}` weighs a LoRA.

        Returns:
            `(B, L, h, w)`; of a model that also predicts a variance, without it.
        """
        config = getattr(model, "module", model).config  # of a model that is wrapped for several processes
        inputs = {"timestep": timesteps, self.attention_argument: attention_kwargs}
        inputs |= self.further_inputs(config, timesteps, tokens, guidance)
        return model(latents, encoder_hidden_states=tokens, **inputs, return_dict=False)[0][:, : latents.shape[1]]

    def further_inputs(
        self, config: Config, timesteps: Tensor, tokens: Tensor, guidance: Tensor | None
    ) -> dict[str, Any]:
        """What only models of this class take, or take in another form, by the names of their arguments."""
        return {}

    def fit(self, config: Config, channels: int, side: int, token_width: int) -> dict[str, Any]:
        """The config of a new model, with the latents' channels and side, and the width of the tokens."""
        sizes = {"in_channels": channels, "out_channels": channels, "sample_size": side}
        return {**config, **sizes, self.token_field: token_width}

    def token_width(self, config: Config) -> int:
        """Width of the condition tokens; a ValueError if the model needs other inputs beside tokens."""
        return config[self.token_field]

    def check_tokens(self, config: Config, width: int, projected: bool = False) -> None:
        """Refuse with a ValueError tokens of another width; `projected` says that a random projection made them."""
        own = self.token_width(config)
        if width != own:
            raise ValueError(
                f"The {self.title} takes condition tokens of width {own} (its {self.token_field}), but the "
                f"conditioner makes tokens of width {width}. Build the {self.title} with {self.token_field}={width}, "
                f"or the conditioner with projection_dim={own}, and train."
            )

    def patch_size(self, config: Config) -> int:
        """Sides of latents must be multiples of it."""
        return config["patch_size"]

    def training_multiple(self, config: Config) -> int:
        """Sides of latents in training must be multiples of it."""
        return self.patch_size(config)

    def check_size(self, config: Config, *sides: int) -> None:
        """Refuse with a ValueError latents that are larger than the model can place."""

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        """Draw the weights of a new model as in DiT (Peebles & Xie, arXiv 2212.09748, section 3.2).

        Matrices are uniform after Glorot, biases zero. Modulation and output are zero, so that blocks start as the
        identity, and what embeds time and condition is normal with a deviation of 0.02.
        """
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            if name.endswith(self.zero_layers):
                nn.init.zeros_(layer.weight)
            elif any(part in name for part in self.small_layers):
                nn.init.normal_(layer.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without what `torch.compile` has put around it, which changes its class and the names of its layers."""
    return model._orig_mod if is_compiled_module(model) else model


def with_lora_methods(model: ModelMixin) -> None:
    """Give a model of a class that lacks them, such as PixArt's, diffusers' methods for LoRA."""
    model = unwrapped(model)
    if not isinstance(model, PeftAdapterMixin):
        own = type(model)
        model.__class__ = type(own.__name__, (own, PeftAdapterMixin), {"__module__": own.__module__})


def width_of(config: Config, num_heads: int, head_width: int) -> int:
    """Width inside a transformer, by its config or, where that says nothing, the heads that diffusers gives it."""
    return config.get("num_attention_heads", num_heads) * config.get("attention_head_dim", head_width)
