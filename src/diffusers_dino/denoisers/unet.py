"""Stable Diffusion's UNet: tokens by cross-attention, latents of any size."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .family import Config, Family

__all__ = ["UNet"]

_EXTRA_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds")


class UNet(Family):
    """`UNet2DConditionModel`."""

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
