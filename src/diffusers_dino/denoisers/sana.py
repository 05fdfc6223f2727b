"""Sana's transformer (Xie et al., arXiv 2410.10629): linear self-attention, tokens by cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import SanaTransformer2DModel
from torch import Tensor

from .family import Config, Family, width_of

__all__ = ["Sana"]


class Sana(Family):
    """`SanaTransformer2DModel`."""

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
