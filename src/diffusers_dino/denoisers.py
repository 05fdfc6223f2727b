"""Denoisers: diffusers' UNet and its transformers behind one face, a class of `Family` for each kind of model.

A new family is such a class, and a place in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    ModelMixin,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "family_named", "family_of", "title_of", "unwrapped", "with_lora_methods"]

Config = Mapping[str, Any]

_EXTRA_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds")


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


class UNet(Family):
    """Stable Diffusion's UNet: tokens by cross-attention, latents of any size."""

    kind = UNet2DConditionModel
    component = "unet"
    title = "UNet"
    token_field = "cross_attention_dim"
    flow = False

    def further_inputs(
        self, config: Config, timesteps: Tensor, tokens: Tensor, guidance: Tensor | None
    ) -> dict[str, Any]:
        """As in `Family`: the guidance scale of a distilled one."""
        return {"timestep_cond": guidance}

    def token_width(self, config: Config) -> int:
        """As in `Family`; a ValueError also if the blocks differ."""
        if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
            raise ValueError(
                f"The UNet projects its condition with encoder_hid_dim_type={config['encoder_hid_dim_type']!r}, which "
                "needs more inputs than image tokens. Use a UNet with 'text_proj', or without a projection."
            )
        extra = [name for name in _EXTRA_CONDITIONS if config.get(name) is not None]
        if extra:
            raise ValueError(
                f"The UNet was built for conditions beside tokens ({', '.join(extra)}), which this pipeline does not "
                "give it. Use a UNet without them, such as Stable Diffusion 1.5's or 2.1's."
            )
        if config.get("encoder_hid_dim") is not None:
            return config["encoder_hid_dim"]
        widths = config["cross_attention_dim"]
        widths = {widths} if isinstance(widths, int) else set(widths)
        if len(widths) != 1:
            raise ValueError(
                f"The UNet's blocks take tokens of different widths, {sorted(widths)}; one width is needed."
            )
        return widths.pop()

    def patch_size(self, config: Config) -> int:
        """A UNet takes any side."""
        return 1

    def training_multiple(self, config: Config) -> int:
        """As often as it halves them."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def initialise(self, model: nn.Module) -> None:
        """diffusers' own weights stay."""


class SD3(Family):
    """Stable Diffusion 3's MMDiT (Esser et al., arXiv 2403.03206).

    All tokens take part in attention, and the class token modulates each block. Stable Diffusion 3 modulates with
    fewer numbers than its tokens have: 2048 of 4096. There the first 2048 of the class token go in, if a random
    projection made the tokens; a part of one is such a projection too.
    """

    kind = SD3Transformer2DModel
    token_field = "joint_attention_dim"
    lora_targets = (*Family.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    attention_argument = "joint_attention_kwargs"
    zero_layers = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")

    def further_inputs(
        self, config: Config, timesteps: Tensor, tokens: Tensor, guidance: Tensor | None
    ) -> dict[str, Any]:
        """As in `Family`: the class token for the modulation."""
        return {"pooled_projections": tokens[:, 0, : config["pooled_projection_dim"]]}

    def fit(self, config: Config, channels: int, side: int, token_width: int) -> dict[str, Any]:
        """As in `Family`; positions reach as far as the latents do."""
        positions = max(config.get("pos_embed_max_size") or 0, side // config.get("patch_size", 2))
        return {
            **super().fit(config, channels, side, token_width),
            "pooled_projection_dim": token_width,
            "caption_projection_dim": width_of(config, 18, 64),
            "pos_embed_max_size": positions,
        }

    def check_tokens(self, config: Config, width: int, projected: bool = False) -> None:
        """As in `Family`, and so for the class token."""
        super().check_tokens(config, width, projected)
        pooled = config["pooled_projection_dim"]
        if pooled > width or (pooled < width and not projected):
            raise ValueError(
                f"The transformer takes a class token of width {pooled} (its pooled_projection_dim), but the "
                f"conditioner's has {width}. Build the transformer with pooled_projection_dim={width}"
                + ("." if pooled > width else f", or the conditioner with projection_dim={width}, and train.")
            )

    def check_size(self, config: Config, *sides: int) -> None:
        """As in `Family`: its positions end at `pos_embed_max_size` patches."""
        patches, most = max(sides) // config["patch_size"], config["pos_embed_max_size"]
        if patches > most:
            raise ValueError(
                f"Images of this size have {patches} patches on a side, and the transformer's positions reach "
                f"{most} (its pos_embed_max_size): make them smaller, or build it with pos_embed_max_size={patches}."
            )


class PixArt(Family):
    """PixArt's transformer (Chen et al., arXiv 2310.00426), also one that predicts a variance.

    Tokens come in by cross-attention, and one modulation serves all blocks.
    """

    kind = PixArtTransformer2DModel
    token_field = "caption_channels"
    latent_sides = ("in_channels",)
    flow = False
    takes_scale = False
    zero_layers = ("attn2.to_out.0", "proj_out")
    small_layers = ("adaln_single", "caption_projection")

    def fit(self, config: Config, channels: int, side: int, token_width: int) -> dict[str, Any]:
        """As in `Family`; without variances, and without the conditions on resolution and aspect ratio."""
        return {
            **super().fit(config, channels, side, token_width),
            "cross_attention_dim": width_of(config, 16, 72),
            "use_additional_conditions": False,
        }

    def token_width(self, config: Config) -> int:
        """As in `Family`; without a projection of the tokens, what cross-attention takes."""
        additional = config.get("use_additional_conditions")
        if additional or (additional is None and config["sample_size"] == 128):
            raise ValueError(
                "The transformer was built for conditions beside tokens (resolution and aspect ratio), which this "
                "pipeline does not give it. Use one with use_additional_conditions=False, such as PixArt-Sigma's."
            )
        channels, out = config["in_channels"], config["out_channels"]
        if out not in (None, channels, 2 * channels):
            raise ValueError(
                f"The transformer has in_channels={channels}, but out_channels={out}: use {channels}, or "
                f"{2 * channels} for one that predicts variances too."
            )
        return config["caption_channels"] or config["cross_attention_dim"]


class Sana(Family):
    """Sana's transformer (Xie et al., arXiv 2410.10629): linear self-attention, tokens by cross-attention."""

    kind = SanaTransformer2DModel
    token_field = "caption_channels"
    attention_argument = "attention_kwargs"
    zero_layers = ("attn2.to_out.0", "proj_out")
    small_layers = ("time_embed", "caption_projection")

    def further_inputs(
        self, config: Config, timesteps: Tensor, tokens: Tensor, guidance: Tensor | None
    ) -> dict[str, Any]:
        """As in `Family`: times in units of its own."""
        return {"timestep": timesteps * config["timestep_scale"]}

    def fit(self, config: Config, channels: int, side: int, token_width: int) -> dict[str, Any]:
        """As in `Family`."""
        return {
            **super().fit(config, channels, side, token_width),
            "cross_attention_dim": width_of(config, 70, 32),
            "guidance_embeds": False,
        }

    def token_width(self, config: Config) -> int:
        """As in `Family`."""
        if config.get("guidance_embeds"):
            raise ValueError(
                "The transformer was distilled to take the guidance scale as an input (guidance_embeds), which this "
                "pipeline does not give it: use one that was not."
            )
        return super().token_width(config)


FAMILIES: tuple[Family, ...] = (UNet(), SD3(), PixArt(), Sana())


def family_of(model: nn.Module) -> Family:
    """The family that a model is of; a ValueError names those that there are."""
    model = unwrapped(model)
    for family in FAMILIES:
        if isinstance(model, family.kind):
            return family
    raise ValueError(_unknown(type(model).__name__))


def family_named(class_name: str) -> Family:
    """The family by the name of diffusers' class, such as a config's `_class_name`; a ValueError as `family_of`."""
    for family in FAMILIES:
        if family.kind.__name__ == class_name:
            return family
    raise ValueError(_unknown(class_name))


def title_of(model: nn.Module) -> str:
    """What messages call a model: "UNet", also one of a kind that is not a family, or "transformer"."""
    return "UNet" if "UNet" in type(unwrapped(model)).__name__ else "transformer"


def _unknown(class_name: Any) -> str:
    *first, last = (family.kind.__name__ for family in FAMILIES)
    return f"{class_name} cannot be used as a denoiser here: it must be a {', a '.join(first)} or a {last}."


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
