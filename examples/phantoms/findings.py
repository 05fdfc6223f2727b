"""Findings as changes of a chest volume: pure functions from a `Chest` and a few numbers to a new `Chest`.

Lengths are millimetres of the scan, before the body is scaled. Lung stays lung where it is consolidated or holds a
nodule; pleural fluid and the enlarged heart are taken out of it, and air around a collapsed lung is kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from anatomy import RIGHT, Chest
from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_effusion", "add_nodule", "add_pneumothorax", "consolidate", "enlarge_heart", "positions", "sample_at"]

AIR, FLUID, HEART_MUSCLE, PUS = -1000.0, 15.0, 45.0, 35.0  # HU


def positions(chest: Chest) -> Tensor:
    """Centre of each voxel, `(3, X, Y, Z)` in mm from the first voxel's centre. Shared: not to be changed in place."""
    return _grid(tuple(chest.hu.shape), chest.spacing)


@lru_cache(maxsize=2)
def _grid(shape: tuple[int, ...], spacing: float) -> Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")) * spacing


def sample_at(volumes: Tensor, points: Tensor, spacing: float) -> Tensor:
    """Read volumes `(C, X, Y, Z)` at points `(3, ...)` in mm, trilinearly; beyond the edge, their outermost voxel."""
    size = torch.tensor(volumes.shape[1:]).view(3, 1, 1, 1)
    grid = 2 * points / (spacing * (size - 1)) - 1  # (3, X', Y', Z')
    grid = grid.flip(0).movedim(0, -1)  # grid_sample wants the last axis of the volume first
    return F.grid_sample(volumes[None], grid[None].float(), padding_mode="border", align_corners=True)[0]


def _bounds(lung: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest corner of a lung in mm, `(3,)` each."""
    voxels = (lung > 0.5).nonzero()
    if not len(voxels):
        raise ValueError("This lung is empty: a finding in it has no place.")
    return voxels.amin(0) * spacing, voxels.amax(0) * spacing


def enlarge_heart(chest: Chest, scale: Sequence[float]) -> Chest:
    """Cardiomegaly: the heart grows into the lungs, away from its upper right border, mostly to the left and down.

    `scale` is the growth along X, Y and Z, each at least 1.
    """
    if min(scale) < 1:
        raise ValueError(f"An enlarged heart has a scale of at least 1 along each axis, got {tuple(scale)}.")
    points = positions(chest)
    low, high = _bounds(chest.heart, chest.spacing)
    anchor = (low + torch.tensor([0.3, 0.5, 0.75]) * (high - low)).view(3, 1, 1, 1)
    source = anchor + (points - anchor) / torch.tensor(scale).view(3, 1, 1, 1)
    grown = sample_at(chest.heart[None], source, chest.spacing)[0]
    invaded = (grown * chest.lungs.sum(0)).clamp(0, 1)
    return replace(
        chest,
        hu=invaded * HEART_MUSCLE + (1 - invaded) * chest.hu,
        heart=torch.maximum(chest.heart, invaded),
        lungs=chest.lungs * (1 - invaded),
    )


def add_pneumothorax(chest: Chest, side: int, collapse: float) -> Chest:
    """Pneumothorax: the lung shrinks towards its hilum and leaves air along the apex and the chest wall.

    `collapse` is the share of the lung's width that is lost, in (0, 0.6].
    """
    if not 0 < collapse <= 0.6:
        raise ValueError(f"collapse must be in (0, 0.6], got {collapse}.")
    lung = chest.lungs[side]
    low, high = _bounds(lung, chest.spacing)
    medial = 1.0 if side == RIGHT else 0.0
    hilum = (low + torch.tensor([medial, 0.45, 0.3]) * (high - low)).view(3, 1, 1, 1)
    shrink = torch.tensor([1 - collapse, 1 - collapse / 2, 1 - 0.6 * collapse]).view(3, 1, 1, 1)
    source = hilum + (positions(chest) - hilum) / shrink
    tissue, kept = sample_at(torch.stack([chest.hu, lung]), source, chest.spacing)
    kept = kept * lung
    # The tissue keeps its mass in less room, but blood flow falls too: half of the gain in density is given back.
    density = 1 + (1 / float(shrink.prod()) - 1) / 2
    tissue = ((tissue - AIR) * density + AIR).clamp(max=HEART_MUSCLE)
    hu = chest.hu + kept * (tissue - chest.hu) + (lung - kept) * (AIR - chest.hu)
    lungs = chest.lungs.clone()
    lungs[side] = kept
    return replace(chest, hu=hu, lungs=lungs, pleural_air=chest.pleural_air + lung - kept)


def add_effusion(chest: Chest, side: int, level: float, rise: float) -> Chest:
    """Pleural effusion: fluid below a level, which climbs along the pleura and so makes the meniscus.

    `level` is a share of the lung's height in (0, 1); at the pleura the fluid climbs by `rise` mm.
    """
    from scipy import ndimage

    if not 0 < level < 1:
        raise ValueError(f"level is a share of the lung's height in (0, 1), got {level}.")
    lung = chest.lungs[side]
    low, high = _bounds(lung, chest.spacing)
    depth = ndimage.distance_transform_edt((lung > 0.5).numpy(), sampling=chest.spacing)
    depth = torch.from_numpy(depth).float()  # mm from the pleura inwards
    surface = low[2] + level * (high[2] - low[2]) + rise * torch.exp(-depth / 12.0)  # (X, Y, Z)
    fluid = ((surface - positions(chest)[2]) / chest.spacing + 0.5).clamp(0, 1) * lung
    lungs = chest.lungs.clone()
    lungs[side] = lung - fluid
    return replace(chest, hu=fluid * FLUID + (1 - fluid) * chest.hu, lungs=lungs)


def consolidate(chest: Chest, centre: Sequence[float], radius: float, density: float, texture: Tensor) -> Chest:
    """Consolidation: a soft cloud of fluid-filled lung that stays within the lobe of its centre.

    It thins out `radius` mm from its centre (in mm); `density` in (0, 1] is the share of air that is replaced there.
    `texture` is coarse noise of about unit variance, `(x, y, z)` of any size, spread over the chest.
    """
    index = tuple(round(c / chest.spacing) for c in centre)
    lobe = int(chest.lobes[index])
    if lobe == 0:
        raise ValueError(f"The centre of a consolidation must lie in a lobe, {tuple(centre)} mm does not.")
    points = positions(chest)
    distance = (points - torch.tensor(centre).view(3, 1, 1, 1)).square().sum(0).sqrt()
    noise = F.interpolate(texture[None, None].float(), size=chest.hu.shape, mode="trilinear", align_corners=True)[0, 0]
    cloud = torch.sigmoid(6 * (1 - distance / radius + 0.25 * noise))
    share = density * cloud * (chest.lobes == lobe) * chest.lungs.sum(0)
    share = share.clamp(0, 1)
    return replace(chest, hu=torch.maximum(chest.hu, share * PUS + (1 - share) * chest.hu))


def add_nodule(chest: Chest, centre: Sequence[float], diameter: float, hu: float) -> Chest:
    """Nodule: a ball of `diameter` mm and density `hu`; voxels that its surface cuts are filled in part."""
    if not 3 <= diameter <= 30:
        raise ValueError(f"A nodule is 3 to 30 mm across (larger is a mass), got {diameter}.")
    distance = (positions(chest) - torch.tensor(centre).view(3, 1, 1, 1)).square().sum(0).sqrt()
    share = ((diameter / 2 - distance) / chest.spacing + 0.5).clamp(0, 1)
    return replace(chest, hu=torch.maximum(chest.hu, share * hu + (1 - share) * chest.hu))
