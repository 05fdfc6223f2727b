"""Paths between images as a figure and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import PIL.Image
from torch import Tensor

from ...pipelines import DinoInterpolationPipeline
from ...sheets import contact_sheet
from ..figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...pipelines import DinoDiffusionPipeline
    from .protocol import InterpolationResult

__all__ = ["draw_paths", "plot_path"]


def draw_paths(
    pipe: DinoDiffusionPipeline, images: Tensor, count: int, fractions: Sequence[float], **call: Any
) -> PIL.Image.Image:
    """Rows of source | path | target, from each of the first `count` images `(N, C, H, W)` in [0, 1] to the next one.

    After the last image comes the first. `call` are further arguments of `DinoInterpolationPipeline`.
    """
    between = DinoInterpolationPipeline.from_pipe(pipe)
    between.set_progress_bar_config(disable=True)
    sources, targets = images[:count], images.roll(-1, 0)[:count]
    return contact_sheet(sources, between(sources, targets, fractions=fractions, **call).images, targets)


def plot_path(result: InterpolationResult) -> Figure:
    """Similarity to both ends along the paths between images, of the model and of its controls."""
    spaces = {"by the encoder": result.by_encoder, "by 16 x 16 pixels": result.by_pixels}
    figure = new_figure(10, 4)
    for axes, (title, space) in zip(figure.subplots(1, 2, sharey=True), spaces.items(), strict=True):
        for number, way in enumerate(fields(space)):
            curves, style = getattr(space, way.name), "-" if way.name == "generated" else "--"
            label = f"{way.name.replace('_', ' ')}: {curves.monotone_steps:.0%}"
            axes.plot(result.fractions, curves.to_source, style, marker=".", color=f"C{number}", label=label)
            axes.plot(result.fractions, curves.to_target, style, marker=".", color=f"C{number}", alpha=0.5)
        axes.set(title=title, xlabel="fraction of the path", ylabel="mean cosine to source | target (pale)")
        axes.grid(alpha=0.3)
        axes.legend(title="steps the right way", fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure
