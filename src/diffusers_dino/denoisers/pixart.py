"""PixArt's transformer (Chen et al., arXiv 2310.00426): tokens by cross-attention, one modulation for all blocks."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel

from .family import Config, Family, width_of

__all__ = ["PixArt"]


class PixArt(Family):
    """`PixArtTransformer2DModel`, also one that predicts a variance."""

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
