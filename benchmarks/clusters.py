"""Clusters of an encoder's patches as lungs: fitted and named on some radiographs, scored on others.

    python benchmarks/clusters.py --encoder facebook/dinov2-small --data montgomery shenzhen

`--data` are folders with `images` and `masks`, an image a patient. Masks are read to score only: how many clusters
there are, and which are lungs, follows from the images. The mean mask of the images that clusters are fitted on is the
control; its threshold is chosen on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_dino import DiffSegPipeline, DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.diffseg.lungs import fit_lung_clusters
from diffusers_dino.evaluation.table_text import markdown_table, with_interval
from diffusers_dino.metrics.bootstrap import bootstrap_interval
from diffusers_dino.metrics.dice import best_union, dice
from diffusers_dino.pixels import with_channels

THRESHOLDS = torch.arange(0.2, 0.7, 0.05)


@dataclass
class Arguments:
    encoder: str = flag("facebook/dinov2-small", "A folder or an id in transformers' format.")
    data: list[str] = flag(["montgomery", "shenzhen"], "Folders with `images` and `masks`.")
    encoder_size: int = flag(392, "Side in pixels that the encoder sees.")
    layers: list[int] = flag([9], "Of the encoder, that the patches leave; each is measured by itself.")
    fitted: int = flag(188, "How many images, drawn at random, clusters are fitted on. The others are scored.")
    seeds: list[int] = flag([0, 1, 2], "Of the clustering.")
    draw: int = flag(0, "Seed of the draw.")
    max_images: int | None = flag(None, "Only the first images of each folder, for a trial.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folders = [open_masked_images(folder, args.encoder_size, max_samples=args.max_images) for folder in args.data]
    samples = [sample for folder in folders for sample in folder]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(args.draw)).tolist()
    fitted, scored = ([samples[i] for i in part] for part in (order[: args.fitted], order[args.fitted :]))
    gray = torch.cat([with_channels(sample.image, 1) for sample in fitted])
    controls = mean_mask_dice([sample.mask for sample in fitted], [sample.mask for sample in scored])
    rows = [["mean mask of the fitted", "", "", estimate(controls)]]
    pipe = DiffSegPipeline(conditioner=DinoImageConditioner.from_encoder(args.encoder, tokens="patch"))
    for layer in args.layers:
        settings = {"encoder_size": args.encoder_size, "encoder_layer": layer}
        features = [pipe.patch_features(sample.image, **settings).half() for sample in [*fitted, *scored]]
        for seed in args.seeds:
            rows.append([f"layer {layer}, seed {seed}", *measure(pipe, features, gray, scored, seed)])
    columns = [f"mean Dice of {len(scored)} [95 %]", "clusters", "best pair", "no ground truth"]
    print(markdown_table(columns, rows))


def measure(pipe: DiffSegPipeline, features: list[Tensor], gray: Tensor, scored: Sequence, seed: int) -> list[str]:
    """Number of clusters, and Dice of the best pair and of what was named, of clusters of the first features."""
    count = len(features) - len(scored)
    clusters = fit_lung_clusters(features[:count], gray, seed=seed)
    named = torch.tensor(clusters.names["lungs"])
    best, by_name = [], []
    for each, sample in zip(features[count:], scored, strict=True):
        size = sample.mask.shape[-1]
        segments = pipe.segment_features(each.float(), clusters=clusters, output_size=size).masks[0]
        best.append(best_union(segments, sample.mask).dice)
        by_name.append(dice(torch.isin(segments, named), sample.mask).item())
    return [str(len(clusters)), estimate(best), estimate(by_name)]


def mean_mask_dice(fitted: list[Tensor], scored: list[Tensor]) -> list[float]:
    """Dice of the mean of the first masks with each of the second."""
    mean = torch.stack(fitted).float().mean(dim=0)
    best = max(THRESHOLDS, key=lambda threshold: sum(dice(mean > threshold, mask).item() for mask in fitted))
    return [dice(mean > best, mask).item() for mask in scored]


def estimate(values: list[float]) -> str:
    array = np.array(values)
    interval = bootstrap_interval(lambda rows: float(array[rows].mean()), len(array))
    return with_interval(array.mean(), *interval, ".3f")


if __name__ == "__main__":
    main()
