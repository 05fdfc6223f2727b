"""Figures for the `evaluate` library: `evaluate.load(module_path("frechet_distance"))`, without a network."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODULES", "module_path"]

MODULES = ("frechet_distance", "kernel_distance", "manifold_figures", "vendi_score")


def module_path(name: str) -> str:
    """The folder that `evaluate.load` takes, of one of `MODULES`; ValueError if it is none of them."""
    if name not in MODULES:
        raise ValueError(f"There is no evaluation module {name!r}: give one of {', '.join(MODULES)}.")
    return str(Path(__file__).parent / name)
