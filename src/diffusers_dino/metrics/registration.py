"""Copies that were moved, turned, cropped or partly covered: small pictures that are laid over each other.

Each image is compared with the training images that resemble it most, whole or by one half, as it is and mirrored.
Turns, scales and shifts are tried first; the best of them are refined by least squares (Lucas & Kanade 1981), in which
blocks that do not fit count little. What is left is compared block by block, so that a part that was covered, or is of
another image, hides nothing of the rest.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.images.preprocessing import border_window
from .extractors.thumbnails import gaussian_blur, local_contrast, local_contrast_features

__all__ = ["SIDE", "Laid", "PictureSearch", "affine", "pictures_of", "warp"]

SIDE = 32  # of a picture in pixels
_BORDER = 0.02  # of the dynamic range: how uniform a border is that is cut off
_COARSE = 16  # side of what candidates are found by
_BLOCKS = 4  # in a row of the last comparison
_BEST = 4  # of the 16 blocks, those that fit best: what half of an image has, less those at the seam
_ALL = 1.4  # weight of all blocks against the best, which fit so much better by chance
_MOST = 0.999  # correlation: more than that says nothing more
_MARGIN = 4  # pixels of a training picture that an image may lack when shifts are tried
_SHIFTS = (-2, 0, 2)  # pixels
_BLUR = 1.5  # pixels, before shifts are tried
_WHOLE, _HALF = 24, 8  # candidates that resemble an image as a whole, and by a half
_TRIED, _SEEN, _KEPT = 6, 4, 4  # of the former, refined after turns and shifts, or as seen; of all, refined further
_STEPS = (2, 4)  # of refinement
_DAMPING = 1e-3
_SPARE = 4  # candidates beyond those wanted, whose order float32 may have wrong
_TOGETHER, _ENTRIES = 16, 1 << 19  # images whose candidates are found together; and at most so many times M
_SEARCHING = threading.Lock()


def affine(degrees: float = 0.0, scale: float = 1.0, right: float = 0.0, down: float = 0.0) -> list[list[float]]:
    """A window that is turned, `scale` sides wide and moved by parts of the side: rows of a `(2, 3)` for `warp`."""
    cos, sin = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
    return [[cos, -sin, 2 * right], [sin, cos, 2 * down]]


_VIEWS = torch.tensor(  # that candidates are found by
    [
        *(affine(degrees) for degrees in (0, 8, -8)),
        *(affine(scale=scale) for scale in (0.9, 1.1)),
        *(affine(right=right, down=down) for right in (0.04, -0.04) for down in (0.04, -0.04)),
    ]
)
_TURNS = torch.tensor(  # that are tried, each with all shifts
    [affine(degrees, scale) for degrees in (-10, -5, 0, 5, 10) for scale in (0.86, 0.93, 1.0, 1.07, 1.15)]
)


class Laid(NamedTuple):
    """The training image that each of N images fits best when laid over it: each `(N,)`.

    Distances are float64 in (0, 1]: the part of the contrast that is left over in the blocks that fit best. Indices
    are int64; `mirrored` says whether the mirror image is what fits.
    """

    distance: Tensor
    index: Tensor
    mirrored: Tensor


class _Guesses(NamedTuple):
    """Training images `(k,)`, what fits them (0, or 1: the mirror image), and through which matrices `(k, 2, 3)`."""

    index: Tensor
    side: Tensor
    matrices: Tensor


def pictures_of(images: Tensor) -> Tensor:
    """Gray pictures `(N, 32, 32)` uint8 of images `(N, C, H, H)` in [0, 1], without uniform borders."""
    pictures = [torch.empty(0, 1, SIDE, SIDE)]
    for image in images.float().mean(dim=1).cpu():
        inner = image[border_window(image.numpy(), _BORDER)]
        inner = inner if 2 * min(inner.shape) >= len(image) else image  # nearly all of it is uniform
        pictures.append(F.interpolate(inner[None, None], (SIDE, SIDE), mode="bilinear", antialias=True))
    return (torch.cat(pictures)[:, 0] * 255).round().to(torch.uint8)


class PictureSearch:
    """Training pictures `(M, 32, 32)` uint8, ready to be searched; it takes about 10 kB an image."""

    def __init__(self, pictures: Tensor) -> None:
        gray = pictures[:, None] / 255
        self._relief = local_contrast(gray)[:, 0]  # (M, 32, 32)
        self._whole = local_contrast_features(gray, _COARSE)  # (M, 256)
        self._halves = _halves(self._whole.view(-1, _COARSE, _COARSE))  # (4, M, 128)
        inner = gaussian_blur(self._relief[:, None], _BLUR, "reflect")[:, 0, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
        self._quarters = _unit(_tiles(inner, 2))  # (M, 4, 144)

    def __len__(self) -> int:
        return len(self._whole)

    def __call__(self, pictures: Tensor, codes: Tensor | None = None, own_codes: Tensor | None = None) -> Laid:
        """The best fit of each of `(N, 32, 32)` uint8; candidates are found together, and laid over one at a time.

        Training images whose code `(M,)` is that of an image `(N,)` are left out for it.
        """
        size = max(1, min(_TOGETHER, -(-len(pictures) // torch.get_num_threads()), _ENTRIES // len(self)))
        parts = pictures.split(size)
        excluded = [None] * len(parts) if codes is None else [own_codes == part[:, None] for part in codes.split(size)]
        with _SEARCHING:  # the number of threads is one for the whole process
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # a thread an image: its operations are too small to share
            try:
                with ThreadPoolExecutor(max_workers=threads) as pool:
                    found = [one for part in pool.map(self._search_part, parts, excluded) for one in part]
            finally:
                torch.set_num_threads(threads)
        distance, index, mirrored = zip(*found, strict=True) if found else ((), (), ())
        return Laid(
            torch.tensor(distance, dtype=torch.float64),
            torch.tensor(index, dtype=torch.long),
            torch.tensor(mirrored, dtype=torch.bool),
        )

    def _search_part(self, pictures: Tensor, excluded: Tensor | None) -> list[tuple[float, int, bool]]:
        sides = torch.stack([pictures, pictures.flip(-1)], dim=1)[:, :, None] / 255  # (n, 2, 1, 32, 32)
        views = torch.stack([local_contrast_features(warp(both, _VIEWS), _COARSE) for both in sides])  # (n, 2 V, 256)
        plain = [local_contrast_features(both, _COARSE).view(2, _COARSE, _COARSE) for both in sides]
        halves = torch.stack([_halves(both) for both in plain], dim=1)  # (4, n, 2, 128)
        whole = (views.flatten(0, 1) @ self._whole.T).view(*views.shape[:2], -1).amax(dim=1)  # (n, M)
        half = (
            torch.bmm(halves.flatten(1, 2), self._halves.transpose(1, 2)).view(4, *halves.shape[1:3], -1).amax((0, 2))
        )
        if excluded is not None:
            whole, half = whole.masked_fill(excluded, -torch.inf), half.masked_fill(excluded, -torch.inf)
        return [
            self._search(both, own_views, own_halves, _highest(by_whole, _WHOLE), _highest(by_half, _HALF))
            for both, own_views, own_halves, by_whole, by_half in zip(
                sides, views, halves.unbind(1), whole, half, strict=True
            )
        ]

    def _search(
        self, sides: Tensor, views: Tensor, halves: Tensor, by_whole: Tensor, by_half: Tensor
    ) -> tuple[float, int, bool]:
        """Lay a picture and its mirror image `(2, 1, 32, 32)` over candidates."""
        # anew, since the last digits of a product depend on how many images there are, and no answer may
        likeness = views @ self._whole[by_whole].T  # (2 V, k)
        by_whole, view = _best_of(likeness, by_whole, _WHOLE)
        likeness = torch.bmm(halves, self._halves[:, by_half].transpose(1, 2)).amax(dim=0)  # (2, k)
        by_half, side = _best_of(likeness, by_half, _HALF)
        relief = local_contrast(sides)
        tried = self._try_out(relief, by_whole)
        index = torch.cat([tried.index, by_whole[:_SEEN], by_half])
        side = torch.cat([tried.side, view[:_SEEN] // len(_VIEWS), side])
        seen = _VIEWS[view[:_SEEN] % len(_VIEWS)], torch.eye(2, 3).expand(len(by_half), 2, 3)
        guesses = _Guesses(index, side, torch.cat([tried.matrices, *seen]))
        right, down = relief[..., 2:] - relief[..., :-2], relief[..., 2:, :] - relief[..., :-2, :]
        slopes = F.pad(right, (1, 1)) * SIDE / 4, F.pad(down, (0, 0, 1, 1)) * SIDE / 4  # a pixel is 2 / SIDE wide
        layers = torch.cat([relief, *slopes, torch.ones_like(relief)], dim=1)  # (2, 4, 32, 32)
        for steps, kept in zip(_STEPS, (_KEPT, 1), strict=True):
            fit, matrices = _refine(layers[guesses.side], self._relief[guesses.index], guesses.matrices, steps)
            best = fit.topk(min(kept, len(fit)))
            guesses = _Guesses(*(x[best.indices] for x in (guesses.index, guesses.side, matrices)))
        return round(math.exp(-best.values[0].item() / 2), 6), int(guesses.index[0]), bool(guesses.side[0])

    def _try_out(self, relief: Tensor, candidates: Tensor) -> _Guesses:
        """The candidates that fit best under a rough turn, scale and shift."""
        turned = warp(gaussian_blur(relief, _BLUR, "reflect"), _TURNS, "zeros")[:, 0]  # (2 T, 32, 32)
        inner = SIDE - 2 * _MARGIN
        starts = [(_MARGIN + y, _MARGIN + x) for y in _SHIFTS for x in _SHIFTS]
        shifted = torch.stack([turned[:, y : y + inner, x : x + inner] for y, x in starts], dim=1).flatten(0, 1)
        quarters = _unit(_tiles(shifted, 2)).transpose(0, 1)  # (4, 2 T S, 144)
        fit = _information(torch.bmm(quarters, self._quarters[candidates].permute(1, 2, 0))).sum(dim=0)
        fit, guess = fit.max(dim=0)  # (K,)
        best = fit.topk(min(_TRIED, len(fit))).indices
        turn, shift = guess[best] // len(starts), guess[best] % len(starts)
        matrices = _TURNS[turn % len(_TURNS)]
        moved = (torch.tensor(starts)[shift].flip(-1) - _MARGIN) * 2 / SIDE  # (k, 2): right, down
        matrices = torch.cat([matrices[..., :2], matrices[..., :2] @ moved[..., None]], dim=-1)
        return _Guesses(candidates[best], turn // len(_TURNS), matrices)


def _highest(values: Tensor, count: int) -> Tensor:
    """Numbers of the highest of `(M,)`, and a few more, but none that is left out."""
    highest = values.topk(min(count + _SPARE, len(values)))
    return highest.indices[highest.values > -torch.inf]


def _best_of(likeness: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of candidates `(k,)` by the highest of their likenesses `(V, k)`, and which that is."""
    values, view = likeness.max(dim=0)
    best = values.topk(min(count, len(values))).indices
    return candidates[best], view[best]


def _refine(layers: Tensor, training: Tensor, matrices: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """How well pictures `(k, 4, 32, 32)` fit `(k, 32, 32)` at best, `(k,)`, and by which matrices `(k, 2, 3)`.

    Layers are relief, its slopes to the right and down, and ones. Steps are Gauss-Newton's, damped.
    """
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, SIDE, SIDE], align_corners=False)
    here = F.pad(grid.view(-1, 2), (0, 1), value=1)  # (P, 3)
    best, best_matrices = torch.full((len(matrices),), -torch.inf), matrices
    for step in range(steps + 1):
        grid = (here @ matrices.transpose(1, 2)).view(-1, SIDE, SIDE, 2)
        seen = F.grid_sample(layers, grid, padding_mode="zeros", align_corners=False)  # (k, 4, 32, 32)
        inside = (seen[:, 3] > 0.99).float()
        correlation = _correlation(seen[:, 0], training, inside)  # (k, 16)
        fit = _fit(correlation)
        better = fit > best
        best = torch.where(better, fit, best)
        best_matrices = torch.where(better[:, None, None], matrices, best_matrices)
        if step == steps:
            break
        weight = correlation.clamp(min=0.05).square().view(-1, _BLOCKS, _BLOCKS)
        weight = weight.repeat_interleave(SIDE // _BLOCKS, 1).repeat_interleave(SIDE // _BLOCKS, 2) * inside
        jacobian = torch.cat([seen[:, axis].flatten(1)[..., None] * here for axis in (1, 2)], dim=-1)  # (k, P, 6)
        weighted = (jacobian * weight.flatten(1)[..., None]).transpose(1, 2)
        normal, right = weighted @ jacobian, weighted @ (training - seen[:, 0]).flatten(1)[..., None]
        normal = normal + (_DAMPING * normal.diagonal(dim1=1, dim2=2).mean(-1) + 1e-6)[:, None, None] * torch.eye(6)
        matrices = matrices + torch.linalg.solve(normal, right).view(-1, 2, 3).clamp(-0.1, 0.1)
    # the matrices are found; now sharp, and what a smooth look has seen still counts
    grid = (here @ best_matrices.transpose(1, 2)).view(-1, SIDE, SIDE, 2)
    sharp = F.grid_sample(layers[:, :1], grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    inside = (grid.abs() < 1 - 1 / SIDE).all(dim=-1).float()
    return best.maximum(_fit(_correlation(sharp, training, inside))), best_matrices


def _fit(correlation: Tensor) -> Tensor:
    """How well blocks `(k, 16)` fit, `(k,)`: by the best of them, or by all."""
    information = _information(correlation)
    return information.topk(_BEST).values.mean(dim=-1).maximum(_ALL * information.mean(dim=-1))


def _correlation(seen: Tensor, training: Tensor, inside: Tensor) -> Tensor:
    """Of each block `(k, 16)`; 0 where half of it or more is outside, or where it shows nothing."""
    a, b, known = (_tiles(x, _BLOCKS) for x in (seen, training, inside))  # (k, 16, 64)
    contrast = ((a.square() * known).sum(-1) * (b.square() * known).sum(-1)).sqrt()
    return (a * b * known).sum(-1) / (contrast + 0.005 * a.shape[-1]) * (known.mean(-1) > 0.5)


def _information(correlation: Tensor) -> Tensor:
    """What a correlation says: minus the logarithm of the share of variance that is left."""
    return -torch.log1p(-correlation.clamp(0, _MOST).square())


def warp(images: Tensor, matrices: Tensor, padding: str = "border") -> Tensor:
    """What windows `(m, 2, 3)` see of each of `(n, C, S, S)`: `(n m, C, S, S)`."""
    grid = F.affine_grid(matrices, [len(matrices), 1, *images.shape[-2:]], align_corners=False)
    repeated = images.repeat_interleave(len(matrices), dim=0)
    return F.grid_sample(repeated, grid.repeat(len(images), 1, 1, 1), padding_mode=padding, align_corners=False)


def _tiles(images: Tensor, count: int) -> Tensor:
    """`(..., S, S)` cut into `(..., count * count, pixels)`."""
    side = images.shape[-1] // count
    return images.unfold(-2, side, side).unfold(-2, side, side).flatten(-2).flatten(-3, -2)


def _halves(images: Tensor) -> Tensor:
    """The upper, lower, left and right half of `(n, S, S)`, of norm 1: `(4, n, S * S / 2)`."""
    middle = images.shape[-1] // 2
    parts = images[:, :middle], images[:, middle:], images[..., :middle], images[..., middle:]
    return torch.stack([_unit(part.flatten(1)) for part in parts])


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
