"""Which file of a sample in a tar is its image, and indexes of several tars as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..images.reading import IMAGE_EXTENSIONS
from .archives import COMPANIONS, PackedKeys, TarIndex, parent_of
from .walk import is_junk

__all__ = ["concatenate", "keep_images", "pad", "separated_companions"]

_WORD = re.compile(r"\.[^\W\d_][^/\n]*$", re.MULTILINE)  # what may follow the key of an image


def keep_images(index: TarIndex, image_column: str) -> tuple[TarIndex, np.ndarray, list[str]]:
    """The samples that have an image, the number `(S,)` of the file that is it, and clauses on what is left out."""
    if not len(index.keys):
        return index, np.zeros(0, np.int64), []
    left_out = []
    index, joined = _join_companions(index)
    if joined:
        left_out.append(f"{COMPANIONS}: {joined}")
    order = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}
    order = order if image_column == "image" else {image_column.lower(): 0}
    ranks = np.array([order.get(extension, len(order)) for extension in index.extensions])[index.kinds]  # (M,)
    count = len(ranks)
    best = np.minimum.reduceat(ranks * count + np.arange(count), index.first_member[:-1])  # (S,): rank, then number
    kept = best < len(order) * count
    if not kept.all():
        left_out.append(f"samples without an image: {np.count_nonzero(~kept)} of {len(kept)}")
    if is_junk(index.keys.to_bytes().decode()):
        junk = np.array([is_junk(key) for key in index.keys])
        left_out.append(f"hidden files and those of systems: {np.count_nonzero(junk & kept)}")
        kept &= ~junk
    if kept.all():
        return index, best % count, left_out
    members = np.repeat(kept, np.diff(index.first_member))
    renumbered = np.cumsum(members) - 1
    return _select(index, kept, members), renumbered[best[kept] % count], left_out


def _join_companions(index: TarIndex) -> tuple[TarIndex, int]:
    """Put `KEY.seg.png` to the sample of the image `KEY`, as its file `seg.png`; how many images that were."""
    if not _may_hold_companions(index.keys):
        return index, 0
    is_image = np.isin(index.kinds, [n for n, one in enumerate(index.extensions) if one in IMAGE_EXTENSIONS])
    has_image = np.logical_or.reduceat(is_image, index.first_member[:-1])
    number_of = {key: number for number, key in enumerate(index.keys) if has_image[number]}
    owners, kinds = np.arange(len(index.keys)), index.kinds.copy()
    known = {extension: number for number, extension in enumerate(index.extensions)}
    for number, key in enumerate(index.keys):
        found = parent_of(key, number_of)
        if found is None and not has_image[number]:
            found = next(((parent, "") for parent in (f"{key}.image", f"{key}.img") if parent in number_of), None)
        if found is not None:
            owners[number] = number_of[found[0]]
            for member in range(index.first_member[number], index.first_member[number + 1]):
                extension = f"{found[1]}.{index.extensions[kinds[member]]}".lower().removeprefix(".")
                kinds[member] = known.setdefault(extension, len(known))
    kept = owners == np.arange(len(owners))
    if kept.all():
        return index, 0
    order = np.argsort(np.repeat(owners, np.diff(index.first_member)), kind="stable")
    sizes = np.bincount(owners, np.diff(index.first_member), len(owners)).astype(np.int64)
    sorted_columns = {"kinds": kinds[order], "offsets": index.offsets[order], "sizes": index.sizes[order]}
    joined = replace(index, extensions=tuple(known), first_member=np.cumsum([0, *sizes]), **sorted_columns)
    return _select(joined, kept, np.ones(len(kinds), bool)), int(np.count_nonzero(has_image & ~kept))


def _select(index: TarIndex, samples: np.ndarray, members: np.ndarray) -> TarIndex:
    """The samples and their files for which these masks, `(S,)` and `(M,)`, are true."""
    columns = {name: getattr(index, name)[members] for name in ("kinds", "offsets", "sizes")}
    keys = PackedKeys([index.keys[number] for number in np.flatnonzero(samples)])
    first = np.cumsum([0, *np.diff(index.first_member)[samples]])
    return replace(index, keys=keys, first_member=first, **columns)


def separated_companions(keys: PackedKeys) -> list[str]:
    """Which samples look like companions of others, which are in other tars."""
    if not _may_hold_companions(keys):
        return []
    known = set(keys)
    return [key for key in keys if parent_of(key, known)]


def _may_hold_companions(keys: PackedKeys) -> bool:
    """False, in one look, for most sets."""
    return bool(_WORD.search(keys.to_bytes().decode()))


def pad(index: TarIndex, images: np.ndarray, missing: int, name: str) -> tuple[TarIndex, np.ndarray]:
    """Add a sample without files, called `name` and a number, for each that is missing."""
    if not missing:
        return index, images
    lost = PackedKeys([f"{name}{number:06d}" for number in range(missing)])
    keys = PackedKeys.from_bytes(index.keys.to_bytes() + lost.to_bytes())
    first = np.append(index.first_member, np.full(len(lost), index.first_member[-1]))
    return replace(index, keys=keys, first_member=first), np.append(images, np.full(len(lost), -1))


def concatenate(indexes: Sequence[TarIndex]) -> TarIndex:
    """One index of the samples of all shards; offsets stay those within each shard."""
    extensions = tuple(sorted({extension for index in indexes for extension in index.extensions}))
    number = {extension: i for i, extension in enumerate(extensions)}
    kinds = [np.array([number[e] for e in index.extensions], np.int32)[index.kinds] for index in indexes]
    starts = np.cumsum([0, *(len(index.kinds) for index in indexes)])
    first = [index.first_member[:-1] + start for index, start in zip(indexes, starts, strict=False)]
    return TarIndex(
        sum(index.tar_bytes for index in indexes),
        PackedKeys.from_bytes(b"".join(index.keys.to_bytes() for index in indexes)),
        extensions,
        np.concatenate([*first, starts[-1:]]),
        np.concatenate(kinds),
        np.concatenate([index.offsets for index in indexes]),
        np.concatenate([index.sizes for index in indexes]),
    )
