"""Stable Diffusion 3's MMDiT (Esser et al., arXiv 2403.03206): joint attention over latents and tokens."""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor

from .family import Config, Family, width_of

__all__ = ["SD3"]


class SD3(Family):
    """`SD3Transformer2DModel`: all tokens take part in attention, and the class token modulates each block.

    Stable Diffusion 3 modulates with fewer numbers than its tokens have: 2048 of 4096. There the first 2048 of the
    class token go in, if a random projection made the tokens; a part of one is such a projection too.
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
