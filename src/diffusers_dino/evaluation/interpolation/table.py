"""Similarities along paths as text for a console."""

from __future__ import annotations

from dataclasses import fields

from .protocol import InterpolationResult

__all__ = ["format_interpolation_table"]


def format_interpolation_table(result: InterpolationResult) -> str:
    """Mean cosines to source and target at each fraction, of the model and its controls, by encoder and by pixels."""
    points = " ".join(f"{fraction:6.2f}" for fraction in result.fractions)
    lines = []
    for name, space in (("encoder", result.by_encoder), ("pixels", result.by_pixels)):
        lines += ["", f"mean cosine by {name:22}{points}   falls and rises, paths, steps the right way"]
        for way in fields(space):
            figures = getattr(space, way.name)
            source, target = (" ".join(f"{value:6.2f}" for value in x) for x in (figures.to_source, figures.to_target))
            label = way.name.replace("_", " ")
            shares = f"{figures.falls_and_rises!s:5} {figures.monotone_paths:.2f} {figures.monotone_steps:.2f}"
            lines += [f"{label:28} source  {source}", f"{label:28} target  {target}   {shares}"]
    return "\n".join(lines)
