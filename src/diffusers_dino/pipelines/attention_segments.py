"""Segments by self-attention maps of a denoiser: DiffSeg's merging, and normalised cuts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..diffseg.attention import capture_self_attention
from ..diffseg.cuts import mean_maps, recursive_cut, walk_affinity
from ..diffseg.merging import aggregate_attention, merge_attention, refine_segments, relative_thresholds
from ..diffseg.settings import ALL_LAYERS, DiffSegSettings, noted_settings
from ..pixels import ImageInput
from .checks import Generators, check_numbers
from .diffseg_arguments import check_merging, mask_size, merge_thresholds
from .pipeline_output import DiffSegPipelineOutput
from .turns import takes_the_denoiser

__all__ = ["AttentionSegmentsMixin"]

_ANCHORS_PER_SIDE = 16  # the published grid


class AttentionSegmentsMixin:
    """What `DiffSegPipeline` does by attention."""

    @property
    def settings(self) -> DiffSegSettings:
        """The defaults: those that were noted with the model by `diffseg.settings.note_settings`, or general ones."""
        return (self.denoiser is not None and noted_settings(self.denoiser)) or DiffSegSettings()

    @takes_the_denoiser
    @torch.no_grad()
    def attention_maps(
        self,
        image: ImageInput,
        timestep: int | Sequence[int] | None = None,
        *,
        size: int | None = None,
        sides: Collection[int] | None = None,
        layers: Collection[str] | Literal["all"] | None = None,
        weights: Mapping[int, float] | None = None,
        add_noise: bool = False,
        generator: Generators = None,
        image_embeds: Tensor | None = None,
        unet_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The aggregated self-attention maps of images: the part that needs the model, apart from what follows.

        A sweep over thresholds computes them once and gives them to `segment` each time. Arguments are as in
        `__call__`.

        Returns:
            `(B, s * s, s, s)` float32, each map of sum 1, on the model's device; s is the largest side.
        """
        timestep = self.settings.timestep if timestep is None else timestep
        self.check_inputs(timestep, size, generator, image_embeds, unet_kwargs, add_noise)
        if layers is None and sides is None:
            layers = self.settings.layers
        with capture_self_attention(self.denoiser, sides, None if layers == ALL_LAYERS else layers) as attention:
            batch_size = self._run(image, timestep, size, add_noise, generator, image_embeds, unet_kwargs)
        maps = [
            aggregate_attention({side: means[i : i + 1] for side, means in attention.items()}, weights=weights)
            for i in range(batch_size)
        ]
        return torch.stack(maps)

    def segment(
        self,
        maps: Tensor,
        merge_threshold: float | Sequence[float] | None = None,
        *,
        num_merges: int = 3,
        anchors_per_side: int | None = None,
        relative_threshold: bool | None = None,
        refine: bool = False,
        merging: str = "kl",
        cut_threshold: float = 0.5,
        walk_steps: int = 2,
        output_size: int | tuple[int, int] | None = None,
        output_type: str = "pt",
    ) -> DiffSegPipelineOutput:
        """Merge aggregated maps to segments.

        Args:
            maps: `(B, s * s, s, s)`, as `attention_maps` gives them.
            output_size: Height and width of the masks, or the side of square ones; by default s.

        The other arguments, and the result, are as in `__call__`.
        """
        default = self.settings.merge_threshold
        thresholds, relative = merge_thresholds(merge_threshold, num_merges, relative_threshold, default)
        anchors_per_side = min(_ANCHORS_PER_SIDE, maps.shape[-1]) if anchors_per_side is None else anchors_per_side
        check_numbers(anchors_per_side=anchors_per_side)
        check_merging(merging, cut_threshold, walk_steps)
        size = mask_size(maps.shape[-1] if output_size is None else output_size)
        merged = []
        for image_maps in maps:
            if merging == "ncut":
                cut = recursive_cut(walk_affinity(image_maps, walk_steps), cut_threshold)
                merged.append(mean_maps(image_maps, cut))
                continue
            own = relative_thresholds(image_maps, thresholds) if relative else thresholds
            candidates = merge_attention(image_maps, own, anchors_per_side)
            merged.append(refine_segments(image_maps, candidates) if refine else candidates)
        return DiffSegPipelineOutput.of(merged, size, output_type)
