"""Images that occur twice: the same pixels, or the same picture after other scaling, compression or contrast."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...extras import require

__all__ = ["MAX_DISTANCE", "Duplicates", "find_duplicates", "near_pairs", "perceptual_hash", "pixel_digest"]

# 256 bits are 16 bands of 16: two hashes that differ in at most 15 bits share a band, by the pigeonhole principle.
_BANDS = 16
MAX_DISTANCE = _BANDS - 1


@dataclass(frozen=True)
class Duplicates:
    """Pairs `(P, 2)` int64 of numbers of images that are the same, the earlier one first; sorted.

    Where many are equal, each is paired with the first. `distance` `(P,)` int64 are the differing bits of the
    perceptual hashes; -1 if all pixels are equal.
    """

    pairs: np.ndarray
    distance: np.ndarray

    @property
    def exact(self) -> np.ndarray:
        """`(P,)` bool: all pixels are equal."""
        return self.distance < 0

    def copies(self, near: bool = False) -> set[int]:
        """The images to leave out so that only the first of equal ones, or with `near` of nearly equal ones, stays."""
        left_out = set(self.pairs[self.exact, 1].tolist())
        if near:  # pairs are sorted: whether `first` stays is known by then
            for (first, second), distance in zip(self.pairs.tolist(), self.distance.tolist(), strict=True):
                if distance == 0 or (distance > 0 and first not in left_out):  # one of equal hash has the same others
                    left_out.add(second)
        return left_out


def pixel_digest(image: np.ndarray) -> str:
    """SHA-256 of a prepared image: its shape, type and pixels."""
    digest = hashlib.sha256(f"{image.shape} {image.dtype} ".encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def perceptual_hash(image: np.ndarray) -> bytes:
    """imagehash's `phash` of a uint8 image `(H, W)` or `(H, W, 3)`: 32 bytes.

    Its bits say which of the 16 x 16 lowest DCT coefficients are above their median. The usual 8 x 8 are too few for
    radiographs, which all resemble each other: docs/shards.md has the figures.
    """
    imagehash = require("imagehash", "shards", "Perceptual hashes need imagehash")
    return np.packbits(imagehash.phash(Image.fromarray(image), hash_size=16).hash).tobytes()


def find_duplicates(digests: list[str], hashes: np.ndarray, max_distance: int = MAX_DISTANCE) -> Duplicates:
    """Find equal images by their `pixel_digest`, and nearly equal ones by their `perceptual_hash`, `(N, 32)` uint8."""
    _, first, group = np.unique(np.asarray(digests), return_index=True, return_inverse=True)
    numbers = np.arange(len(digests))
    copies = numbers[first[group] != numbers]
    exact = np.stack([first[group[copies]], copies], axis=1)
    unique = np.sort(first)  # one of each group
    near, distance = near_pairs(hashes[unique], max_distance)
    pairs = np.concatenate([exact, unique[near]])
    distance = np.concatenate([np.full(len(exact), -1), distance])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Duplicates(pairs[order], distance[order])


def near_pairs(hashes: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of hashes `(N, 32)` that differ in few bits, by multi-index hashing (Norouzi et al., CVPR 2012).

    Only hashes that share one of 16 bands are compared, and equal hashes only once: a million hashes take minutes
    instead of days. Of equal hashes each is paired with the first. Beyond `MAX_DISTANCE` pairs would be missed, hence
    `ValueError`. Gives `(P, 2)` int64, the smaller number first, and `(P,)` int64, their differing bits.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"The distance of near duplicates must be in [0, {MAX_DISTANCE}] bits, got {max_distance}")
    if len(hashes) == 0:
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    unique, first, group = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    numbers = np.arange(len(hashes))
    copies = numbers[first[group] != numbers]
    found = [np.stack([first[group[copies]], copies], axis=1)]
    distances = [np.zeros(len(copies), np.int64)]
    words = np.ascontiguousarray(unique).view(np.uint16)  # (U, 16)
    for band in _bands(unique).T:
        pairs, distance = _pairs_in_band(words, band, max_distance)
        found.append(np.sort(first[pairs], axis=1))
        distances.append(distance)
    pairs, distance = np.concatenate(found), np.concatenate(distances)
    pairs, once = np.unique(pairs, axis=0, return_index=True)  # similar hashes meet in many bands
    return pairs, distance[once]


def _bands(hashes: np.ndarray) -> np.ndarray:
    """`(U, 32)` uint8 -> `(U, 16)` uint16. Each band has one bit of each row and each column of the DCT.

    Low frequencies look alike in all radiographs: a band of only those would put most images into a few buckets.
    """
    bits = np.unpackbits(hashes, axis=1).reshape(-1, 16, 16)
    diagonals = np.stack([np.roll(bits[:, row], row, axis=1) for row in range(16)], axis=2)  # (U, band, 16)
    return np.packbits(diagonals, axis=2).view(np.uint16)[..., 0]


def _pairs_in_band(words: np.ndarray, band: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that share a band's value and differ little elsewhere: `(P, 2)` and `(P,)`.

    Sorted by the band's value, the hashes of a bucket are neighbours. Each is compared with the next one, then with
    the one after, and so on up to the size of the largest bucket. Memory is linear in the number of hashes.
    """
    order = np.argsort(band, kind="stable")
    value = band[order]
    found, distances = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    left = np.arange(len(order))
    step = 1
    while len(left := left[left + step < len(order)]) and len(left := left[value[left] == value[left + step]]):
        pairs = np.stack([order[left], order[left + step]], axis=1)
        distance = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).sum(axis=1, dtype=np.int64)
        near = distance <= max_distance
        found.append(pairs[near])
        distances.append(distance[near])
        step += 1
    return np.concatenate(found), np.concatenate(distances)
