"""The denoiser of a pipeline, which is its `unet` or its `transformer`."""

from __future__ import annotations

from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from torch import nn

__all__ = ["DenoiserMixin"]


class DenoiserMixin(StableDiffusionMixin):
    """What pipelines with a UNet or a transformer say of it, and diffusers' switches that only a UNet has."""

    unet: nn.Module | None
    transformer: nn.Module | None

    @property
    def denoiser(self) -> nn.Module | None:
        """The model that denoises: the `transformer` where there is one, else the `unet`."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def denoiser_name(self) -> str:
        """What the component is called: `"unet"` or `"transformer"`."""
        return "unet" if self.transformer is None else "transformer"

    def enable_freeu(self, *args: float, **kwargs: float) -> None:
        """As in diffusers; a ValueError without a UNet, whose skip connections it weighs."""
        if self.unet is None:
            raise ValueError("FreeU weighs the skip connections of a UNet, and this pipeline has none.")
        super().enable_freeu(*args, **kwargs)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As in diffusers; a ValueError for the UNet of a pipeline that has none."""
        if unet and self.unet is None:
            raise ValueError("There is no unet to fuse: call it with unet=False, or on the transformer itself.")
        super().fuse_qkv_projections(unet, vae)
