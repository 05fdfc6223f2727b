"""Condition tokens of a plan's sources: each is encoded once, kept on disk, and read by number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data import ImageDataset
from ..data.datasets import to_float
from ..files import atomic_write
from ..pipelines import DinoDiffusionPipeline
from .plan import Plan
from .settings import SynthesisError

__all__ = ["PlannedSources", "TokenStore", "encode_part", "has_part", "num_parts", "settled_arithmetic"]

_SOURCES_PER_PART = 256
_MAX_PARTS = 512  # all of them are open at once in each process


@contextmanager
def settled_arithmetic(threads: int) -> Iterator[None]:
    """Compute with so many threads, and by deterministic kernels where cuDNN has a choice."""
    others, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(others)
        cudnn.deterministic, cudnn.benchmark = before


class PlannedSources:
    """The source images of a plan within a data set, by the plan's numbers.

    Args:
        plan: The plan.
        images: A data set that holds them all.

    Raises:
        SynthesisError: If a key of the plan is not in the data set, or is there twice.
    """

    def __init__(self, plan: Plan, images: ImageDataset) -> None:
        places: dict[str, int] = {}
        for place, key in enumerate(images.keys):
            places[key] = -1 if key in places else place
        wanted = list(plan.keys)
        missing = [key for key in wanted if key not in places]
        if missing:
            raise SynthesisError(
                f"{len(missing)} of the plan's {len(wanted)} sources are not among the {len(images)} images, such as "
                f"{', '.join(missing[:3])}. Give the images that the plan was made for, or keys that they have."
            )
        twice = [key for key in wanted if places[key] < 0]
        if twice:
            raise SynthesisError(f"{len(twice)} sources name several images, such as {', '.join(twice[:3])}.")
        self.images = images
        self._places = np.array([places[key] for key in wanted], np.int64)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor | None, str]]:
        """Prepared images `(C, H, W)` in [0, 1], or None and why it cannot be read."""
        places = self._places[list(numbers)].tolist()
        for place, (key, array) in zip(places, self.images.read_many(places), strict=True):
            # A data set puts another sample in the place of an unreadable one: its labels would be wrong here.
            if place in self.images.unreadable:
                yield None, self.images.unreadable[place]
            else:
                yield to_float(array), key


def num_parts(plan: Plan) -> int:
    """How many files the tokens of a plan's sources go into."""
    return -(-len(plan.keys) // _part_size(plan))


def has_part(plan: Plan, number: int, folder: Path) -> bool:
    """Whether a part is there, complete, and of this plan."""
    try:
        with safe_open(_path(folder, number), framework="pt") as file:
            header = json.loads((file.metadata() or {})["tokens"])
            shape = file.get_slice("tokens").get_shape()
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return False
    return header == _header(plan, number) and shape[0] == len(_numbers(plan, number))


def encode_part(
    plan: Plan, number: int, pipe: DinoDiffusionPipeline, sources: PlannedSources, folder: Path
) -> list[str]:
    """Encode the sources of one part and write their tokens, in the encoder's own type, unless one cannot be read.

    The tokens follow from the plan and the images alone: they are encoded in batches of one size.

    Args:
        plan: Bound to this model and these sources.
        number: In `range(num_parts(plan))`.
        pipe: Its conditioner encodes.
        sources: `PlannedSources(plan, images)`.
        folder: Where parts are kept.

    Returns:
        Why sources of this part cannot be read, a sentence each; empty if the part is written.

    Raises:
        OSError: If the disk is full.
    """
    numbers, size = _numbers(plan, number), plan.settings.batch_size
    tokens, problems = [], []
    with settled_arithmetic(plan.settings.threads), torch.no_grad():
        for start in range(numbers.start, numbers.stop, size):
            batch = range(start, min(start + size, numbers.stop))
            read = list(sources.read(batch))
            problems += [reason for image, reason in read if image is None]
            if problems:
                continue  # go on to name all of them
            images = [image for image, _ in read]
            padded = images + images[-1:] * (size - len(images))
            tokens.append(pipe.encode_image(padded)[: len(images)].cpu())
    if not problems:
        metadata = {"tokens": json.dumps(_header(plan, number), sort_keys=True)}
        with atomic_write(_path(folder, number)) as file:
            file.write(save({"tokens": torch.cat(tokens).contiguous()}, metadata))
    return problems


class TokenStore:
    """The tokens of all sources of a plan, memory-mapped as they are asked for.

    Args:
        plan: The plan.
        folder: Where `encode_part` wrote all parts.

    Raises:
        SynthesisError: If a part is missing or of another plan.
    """

    def __init__(self, plan: Plan, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = [number for number in range(num_parts(plan)) if not has_part(plan, number, self.folder)]
        if missing:
            raise SynthesisError(
                f"{len(missing)} of {num_parts(plan)} parts of the sources' tokens are missing in {self.folder}, the "
                f"first is {_path(self.folder, missing[0]).name}: start again, and they are encoded."
            )
        self._size = _part_size(plan)
        self._opened: dict[int, Tensor] = {}

    def __getitem__(self, numbers: np.ndarray) -> Tensor:
        """Tokens `(n, S, D)` of sources by number `(n,)`."""
        rows = [self._part(number // self._size)[number % self._size] for number in numbers.tolist()]
        return torch.stack(rows)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}  # another process maps for itself

    def _part(self, number: int) -> Tensor:
        if number not in self._opened:
            with safe_open(_path(self.folder, number), framework="pt") as file:
                self._opened[number] = file.get_tensor("tokens")
        return self._opened[number]


def _part_size(plan: Plan) -> int:
    """Sources in a part: whole batches."""
    batch = plan.settings.batch_size
    return -(-max(_SOURCES_PER_PART, -(-len(plan.keys) // _MAX_PARTS)) // batch) * batch


def _numbers(plan: Plan, number: int) -> range:
    size = _part_size(plan)
    return range(number * size, min((number + 1) * size, len(plan.keys)))


def _header(plan: Plan, number: int) -> dict[str, object]:
    return {"plan": plan.digest, "part": number}


def _path(folder: Path, number: int) -> Path:
    return Path(folder) / f"tokens-{number:06d}.safetensors"
