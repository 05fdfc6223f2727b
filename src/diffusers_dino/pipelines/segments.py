"""The steps of `DiffSegPipeline`: read attention, or features of patches, and make segments of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..diffseg.attention import capture_features, capture_self_attention, self_attention_layers
from ..diffseg.clusters import FeatureClusters, fit_clusters
from ..diffseg.cuts import cut_features, mean_maps, recursive_cut, walk_affinity
from ..diffseg.features import stack_features
from ..diffseg.merging import aggregate_attention, merge_attention, refine_segments, relative_thresholds
from ..diffseg.settings import ALL_LAYERS, DiffSegSettings, noted_settings
from ..pixels import ImageInput
from .checks import Generators, check_numbers
from .diffseg_inputs import check_merging, listed_features, mask_size, merge_thresholds
from .pipeline_output import DiffSegPipelineOutput
from .turns import takes_the_denoiser

__all__ = ["SegmentsMixin"]

_ANCHORS_PER_SIDE = 16  # the published grid


class SegmentsMixin:
    """The steps of `DiffSegPipeline`, one by one: to read maps or features of images, and to segment by them."""

    @property
    def settings(self) -> DiffSegSettings:
        """The defaults: those that were noted with the model by `diffseg.settings.note_settings`, or general ones."""
        return (self.denoiser is not None and noted_settings(self.denoiser.config)) or DiffSegSettings()

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

    @takes_the_denoiser
    @torch.no_grad()
    def patch_features(
        self,
        image: ImageInput,
        features: str | Sequence[str] = "encoder",
        *,
        timestep: int | Sequence[int] = 50,
        size: int | None = None,
        layers: Collection[str] | None = None,
        encoder_size: int | None = None,
        encoder_layer: int | None = None,
        image_embeds: Tensor | None = None,
        unet_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """A vector for each patch of images, which `segment_features` and `fit_clusters` compare.

        Args:
            features: `"unet"`: what self-attention layers give, of the clean latents, as in DiffCut (arXiv
                2406.02842); `"encoder"`: patch tokens of the conditioner's encoders; or both, side by side.
            layers: Of the denoiser; by default the last self-attention of its encoder, as there.
            encoder_size: Side in pixels that the encoders see, such as 392; by default their own.
            encoder_layer: See `DinoImageConditioner.patch_features`.

        The other arguments, and the errors, are as in `__call__`.

        Returns:
            `(B, D, h, w)` float32; of several sources on the finest of their grids, each of one mean square.
        """
        parts, kinds = [], listed_features(features)
        if "encoder" in kinds and self.conditioner is None:
            raise ValueError("This pipeline has no conditioner, whose encoder makes features: use features='unet'.")
        if "unet" in kinds:
            self.check_inputs(timestep, size, None, image_embeds, unet_kwargs)
            layers = self_attention_layers(self.denoiser) if layers == ALL_LAYERS else layers
            with capture_features(self.denoiser, layers) as captured:
                self._run(image, timestep, size, False, None, image_embeds, unet_kwargs)
            parts += captured
        if "encoder" in kinds:
            parts.append(self.conditioner.patch_features(image, encoder_size, encoder_layer))
        return stack_features(parts) if len(parts) > 1 else parts[0]

    def fit_clusters(
        self,
        images: Iterable[ImageInput],
        num_clusters: int | Sequence[int] = range(4, 13),
        *,
        features: str | Sequence[str] = "encoder",
        seed: int = 0,
        **options: Any,
    ) -> FeatureClusters:
        """Cluster the patches of many images, so that a segment keeps its identity from image to image.

        Args:
            images: One after the other, or in batches; no mask is needed.
            num_clusters: How many, or several numbers of which the most stable is taken: see
                `diffusers_dino.diffseg.clusters.fit_clusters`, which has the errors, too. Needs scikit-learn.
            features: As in `patch_features`, whose other arguments are `options`. The clusters keep these, without
                `image_embeds` and `unet_kwargs`, which are of these images.
            seed: Of the clustering.
        """
        settings = {"features": listed_features(features), **options}
        made = (self.patch_features(batch, **settings) for batch in images)
        kept = {name: value for name, value in settings.items() if name not in ("image_embeds", "unet_kwargs")}
        return fit_clusters(made, num_clusters, settings=kept, seed=seed)

    def segment_features(
        self,
        features: Tensor,
        *,
        clusters: FeatureClusters | None = None,
        cut_threshold: float = 0.2,
        cut_power: float = 4.0,
        output_size: int | tuple[int, int] | None = None,
        output_type: str = "pt",
    ) -> DiffSegPipelineOutput:
        """Segment by features `(B, D, h, w)`, as `patch_features` gives them.

        Args:
            clusters: What `fit_clusters` gave for the same kind of features; without, each image is cut by itself.
            output_size: Height and width of the masks, or the side of square ones; by default that of the features.

        The other arguments, and the result, are as in `__call__`.
        """
        check_merging("ncut", cut_threshold, cut_power=cut_power)
        size = mask_size(tuple(features.shape[-2:]) if output_size is None else output_size)
        if clusters is not None:
            maps = list(clusters.assign(features))
        else:
            maps = [cut_features(each, cut_threshold, cut_power) for each in features]
        return DiffSegPipelineOutput.of(maps, size, output_type)
