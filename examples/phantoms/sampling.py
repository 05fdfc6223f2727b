"""Draw one phantom: every number of sample i depends only on (seed, split, i)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from anatomy import LEFT, RIGHT, Chest
from findings import add_effusion, add_nodule, add_pneumothorax, consolidate, enlarge_heart
from projection import attenuation, deform, develop, project
from torch import Tensor

__all__ = ["LABELS", "VERSION", "Phantom", "draw_findings", "make_phantom"]

VERSION = "1.0"
LABELS = ("Cardiomegaly", "Effusion", "Pneumothorax", "Consolidation", "Nodule")  # as NIH ChestX-ray14 spells them
SPLITS = {"train": 0, "test": 1}
SIDES = {RIGHT: "right", LEFT: "left"}
# A pixel belongs to the lung mask if its ray crosses at least LUNG_PATH mm of lung or pleural air, and at most
# ABDOMEN_PATH mm of organs below the diaphragm: annotators end the lung fields at its dome, too.
LUNG_PATH, ABDOMEN_PATH = 20.0, 20.0


@dataclass(frozen=True)
class Phantom:
    """One synthetic radiograph, its lung fields, and its labels and the numbers that made it, ready for JSON."""

    image: np.ndarray  # (size, size) uint8
    mask: np.ndarray  # (size, size) bool
    meta: dict


def make_phantom(chest: Chest, seed: int, split: str, index: int, size: int = 128) -> Phantom:
    """Make sample `index` of the split `"train"` or `"test"`, which share no random stream; `size` is in pixels."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    # Independent streams: a change in how findings are drawn leaves body, view and exposure as they were.
    streams = np.random.SeedSequence([seed, SPLITS[split], index]).spawn(4)
    findings, body, view, film = (np.random.default_rng(stream) for stream in streams)
    diseased, labels, found = draw_findings(chest, findings)
    volumes, body_numbers = _draw_body(diseased, chest, body)
    (integrals, lung_path, abdomen_path), view_numbers = _draw_view(volumes, chest, size, view)
    mask = _without_specks((lung_path >= LUNG_PATH) & (abdomen_path <= ABDOMEN_PATH))
    image, film_numbers = _draw_film(integrals, film)
    meta = {
        "labels": labels or ["No Finding"],
        "findings": found,
        "body": body_numbers,
        "view": view_numbers,
        "film": film_numbers,
        "seed": seed,
        "split": split,
        "index": index,
        "version": VERSION,
    }
    return Phantom((image * 255).round().byte().numpy(), mask, meta)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 3 if high <= 2 else 1)


def _without_specks(mask: Tensor) -> np.ndarray:
    """Drop what is smaller than 1/500 of the picture: rays that slip past the organs below the diaphragm."""
    from scipy import ndimage

    parts, count = ndimage.label(mask.numpy())
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    large = sizes >= mask.numel() / 500
    large[0] = False  # the background
    return large[parts]


def draw_findings(chest: Chest, rng: np.random.Generator) -> tuple[Chest, list[str], list[dict]]:
    """Draw labels and place their findings in a healthy chest.

    Gives the diseased chest, its labels (none for a healthy one), and the numbers of each finding.
    """
    count = rng.choice(4, p=[0.25, 0.4, 0.25, 0.1])
    chosen = rng.choice(len(LABELS), size=count, replace=False)
    labels = [label for i, label in enumerate(LABELS) if i in chosen]
    found: list[dict] = []
    side = int(rng.integers(2))  # fluid and air are put on opposite sides

    def note(name: str, **numbers) -> dict:
        found.append({"name": name, **numbers})
        return numbers

    if "Cardiomegaly" in labels:
        width = _uniform(rng, 1.3, 1.7)
        numbers = note("Cardiomegaly", scale=[width, round(1 + 0.6 * (width - 1), 3), round(1 + 0.5 * (width - 1), 3)])
        chest = enlarge_heart(chest, **numbers)
    if "Pneumothorax" in labels:
        numbers = note("Pneumothorax", side=SIDES[1 - side], collapse=_uniform(rng, 0.15, 0.5))
        chest = add_pneumothorax(chest, 1 - side, numbers["collapse"])
    if "Effusion" in labels:
        numbers = note("Effusion", side=SIDES[side], level=_uniform(rng, 0.2, 0.5), rise=_uniform(rng, 20, 45))
        chest = add_effusion(chest, side, numbers["level"], numbers["rise"])
    if "Consolidation" in labels:
        for _ in range(int(rng.integers(1, 3))):
            numbers = note(
                "Consolidation",
                centre=_place(chest, rng),
                radius=_uniform(rng, 22, 45),
                density=_uniform(rng, 0.5, 0.9),
            )
            texture = torch.from_numpy(rng.standard_normal([n // 6 for n in chest.hu.shape]))
            chest = consolidate(chest, **numbers, texture=texture)
    if "Nodule" in labels:
        for _ in range(int(rng.integers(1, 3))):
            numbers = note(
                "Nodule",
                centre=_place(chest, rng),
                diameter=_uniform(rng, 6, 15),
                hu=_uniform(rng, 50, 300),
            )
            chest = add_nodule(chest, **numbers)
    return chest, labels, found


def _place(chest: Chest, rng: np.random.Generator) -> list[float]:
    """A random place in aerated lung, 10 mm away from anything else, in mm."""
    from scipy import ndimage

    inside = ((chest.lungs.sum(0) > 0.9) & (chest.lobes > 0)).numpy()
    core = ndimage.binary_erosion(inside, iterations=round(10 / chest.spacing))
    voxels = np.argwhere(core if core.any() else inside)
    return [float(c) * chest.spacing for c in voxels[rng.integers(len(voxels))]]


def _draw_body(diseased: Chest, chest: Chest, rng: np.random.Generator) -> tuple[Tensor, dict]:
    """Attenuation, lung fields and abdomen of a body of its own size and shape, `(3, X, Y, Z)`."""
    numbers = {
        "scale": [_uniform(rng, 0.88, 1.12), _uniform(rng, 0.85, 1.2), _uniform(rng, 0.85, 1.1)],
        "bone_contrast": _uniform(rng, 0.3, 1.1),
        "warp_mm": _uniform(rng, 4, 10),
    }
    warp = torch.from_numpy(rng.standard_normal((3, 5, 4, 5))) * numbers["warp_mm"]
    fields = diseased.lungs.sum(0) + diseased.pleural_air
    volumes = torch.stack([attenuation(diseased.hu, numbers["bone_contrast"]), fields, diseased.abdomen])
    return deform(volumes, chest, numbers["scale"], warp), numbers


def _draw_view(volumes: Tensor, chest: Chest, size: int, rng: np.random.Generator) -> tuple[Tensor, dict]:
    numbers = {
        "rotation": [_uniform(rng, -8, 8), _uniform(rng, -6, 6), _uniform(rng, -4, 4)],
        "shift": [_uniform(rng, -15, 15), _uniform(rng, -20, -2)],
        "field": _uniform(rng, 290, 335),
        "source_distance": _uniform(rng, 1000, 1800),
        "detector_distance": _uniform(rng, 130, 200),
    }
    picture = project(volumes[:1], chest, size=size, **numbers)
    paths = project(volumes[1:], chest, size=size, **numbers, samples=0.75)  # smooth volumes need no more
    return torch.cat([picture, paths]), numbers


def _draw_film(integrals: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict]:
    numbers = {
        "photons": round(float(np.exp(rng.uniform(np.log(1e6), np.log(1e7))))),
        "scatter": _uniform(rng, 0.02, 0.1),
        "flatten": _uniform(rng, 0.1, 0.55),
        "sharpen": _uniform(rng, 0.0, 0.5),
        "black": _uniform(rng, 0.002, 0.03),
        "white": _uniform(rng, 0.97, 0.999),
        "gamma": _uniform(rng, 0.75, 1.3),
        "darkest": _uniform(rng, 0.0, 0.12),
        "brightest": _uniform(rng, 0.82, 1.0),
    }
    noise = torch.from_numpy(rng.standard_normal(tuple(integrals.shape))).float()
    return develop(integrals, **numbers, noise=noise), numbers
