"""Segments by features of patches, of a denoiser or an encoder, in place of attention: cuts and clusters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffseg.attention import capture_features
from ..diffseg.clusters import FeatureClusters, fit_clusters
from ..diffseg.cuts import cut_features
from ..diffseg.features import stack_features
from ..pixels import ImageInput
from .diffseg_arguments import check_merging, listed_features, mask_size
from .pipeline_output import DiffSegPipelineOutput
from .turns import takes_the_denoiser

__all__ = ["FeatureSegmentsMixin"]


class FeatureSegmentsMixin:
    """What `DiffSegPipeline` does by features: those of its denoiser, and those of its conditioner's encoders."""

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
            features: As in `patch_features`, whose other arguments are `options`.
            seed: Of the clustering.
        """
        settings = {"features": listed_features(features), **options}
        made = (self.patch_features(batch, **settings) for batch in images)
        return fit_clusters(made, num_clusters, settings=settings, seed=seed)

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
