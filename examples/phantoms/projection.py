"""From a chest to its radiograph: deform the body, project it with DiffDRR, expose and develop the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from anatomy import Chest
from findings import positions, sample_at
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attenuation", "deform", "develop", "lung_centre", "project"]

WATER = 0.02  # 1/mm at about 65 keV, the middle of a filtered 120 kV spectrum (NIST XCOM: 0.0206 at 60, 0.0184 at 80)


def attenuation(hu: Tensor, bone_contrast: float = 0.6) -> Tensor:
    """Linear attenuation coefficients in 1/mm of a volume in Hounsfield units.

    Water and air are linear in HU. The radiograph's spectrum is softer than the scanner's, so what is denser than soft
    tissue gains `bone_contrast` on top.
    """
    return WATER * (1 + hu / 1000 + bone_contrast * (hu - 100).clamp(min=0) / 1000).clamp(min=0)


def lung_centre(chest: Chest) -> Tensor:
    """Middle of the lungs' bounding box, `(3,)` in mm."""
    voxels = (chest.lungs.sum(0) > 0.5).nonzero()
    return (voxels.amin(0) + voxels.amax(0)) / 2 * chest.spacing


def deform(volumes: Tensor, chest: Chest, scale: Sequence[float], warp: Tensor) -> Tensor:
    """Scale the body about the lungs' centre along X, Y and Z, and bend it smoothly.

    `volumes` are `(C, X, Y, Z)`; `warp` `(3, x, y, z)` is displacements in mm on a coarse grid that spans the chest.
    """
    centre = lung_centre(chest).view(3, 1, 1, 1)
    bend = F.interpolate(warp[None].float(), size=chest.hu.shape, mode="trilinear", align_corners=True)[0]
    source = centre + (positions(chest) - centre) / torch.tensor(scale).view(3, 1, 1, 1) + bend
    return sample_at(volumes, source, chest.spacing)


def project(
    volumes: Tensor,
    chest: Chest,
    size: int,
    field: float,
    rotation: Sequence[float],
    shift: Sequence[float],
    source_distance: float,
    detector_distance: float,
    samples: float = 1.5,
) -> Tensor:
    """Line integrals through volumes for a PA radiograph (source behind the patient), patient's right on the left.

    Densities `(C, X, Y, Z)` -> integrals `(C, size, size)`, density times mm. The patient turns about the centre of
    the lungs of `chest`: pass the healthy one, so that a finding does not move the view. `field` is the side of the
    square that the picture shows in the plane of that centre; `rotation` is in degrees about the body's long axis, its
    left-right axis and the line of sight; `shift` moves the picture to the patient's right and to the head; distances
    are from the centre. All lengths are in mm. `samples` are points along a ray for each voxel of the chest's depth.
    """
    from diffdrr.data import read
    from diffdrr.drr import DRR
    from torchio import ScalarImage

    affine = np.diag([-chest.spacing, chest.spacing, chest.spacing, 1.0])  # the world's x runs to the patient's right
    affine[:3, 3] = -(affine[:3, :3] @ (lung_centre(chest).numpy() / chest.spacing))
    frame = ScalarImage(tensor=torch.ones(1, 2, 2, 2), affine=affine)  # only its affine is used
    sdd = source_distance + detector_distance
    drr = DRR(
        read(frame, orientation="PA", center_volume=False),
        sdd=sdd,
        height=size,
        delx=field / size * sdd / source_distance,
        renderer="trilinear",
    )
    angles = torch.tensor([rotation], dtype=torch.float32)
    camera = torch.tensor([[shift[0], -source_distance, shift[1]]], dtype=torch.float32)
    pose = {"parameterization": "euler_angles", "convention": "ZXY", "degrees": True}
    pictures = []
    for volume in volumes:
        drr.density = volume.contiguous()
        pictures.append(drr(angles, camera, **pose, n_points=int(samples * chest.hu.shape[1])))
    return torch.cat(pictures, dim=1)[0]


def develop(
    integrals: Tensor,
    *,
    photons: float,
    scatter: float,
    flatten: float,
    sharpen: float,
    black: float,
    white: float,
    gamma: float,
    darkest: float,
    brightest: float,
    noise: Tensor,
) -> Tensor:
    """Line integrals to the grey values of a radiograph: dark lungs, bright bones.

    Of `photons` that would reach a pixel through nothing, `noise` (standard normal draws) makes the noise; `scatter`
    is scattered over primary radiation. `flatten` in [0, 1) takes out broad differences of brightness, `sharpen` is
    the gain of the finest detail. What is beyond the quantiles `black` and `white` is equally dark or bright:
    `darkest` and `brightest`, with an exponent `gamma` between. `(H, W)` -> `(H, W)` in [0, 1].
    """
    primary = torch.exp(-integrals)
    signal = primary + scatter * _blur(primary, len(integrals) / 5)
    signal = signal + noise * (signal / photons).sqrt()
    density = -torch.log(signal.clamp(min=1 / photons))
    density = density - flatten * _blur(density, len(integrals) / 8) + sharpen * (density - _blur(density, 1.5))
    low, high = density.flatten().quantile(torch.tensor([black, white]))
    return darkest + (brightest - darkest) * ((density - low) / (high - low)).clamp(0, 1) ** gamma


def _blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `(H, W)`; the edge is repeated."""
    radius = int(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(picture[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]
