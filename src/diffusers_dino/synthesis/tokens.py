"""Condition tokens of a plan's sources: each source is encoded once, kept on disk, and read by its number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data import ImageDataset
from ..data.datasets import to_float
from ..data.stores.walk import WORK
from ..devices import deterministic
from ..embeddings import lerp
from ..files import atomic_write
from ..pipelines import DinoDiffusionPipeline, DinoPriorPipeline
from ..prior import Condition
from ..seeds import generator_for
from .plan import Plan, SynthesisError

__all__ = ["TOKENS", "PlannedSources", "PriorTokens", "TokenStore"]

TOKENS = f"{WORK}/tokens"  # needed until the set is complete

_SOURCES_PER_PART = 256
_MAX_PARTS = 512  # each process has all of them open at once


class PlannedSources:
    """The source images of a plan within a data set that has each of them once, by the plan's numbers."""

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
        """Each prepared image `(C, H, W)` in [0, 1] and its key, or None and why it cannot be read."""
        places = self._places[list(numbers)].tolist()
        # Another image in the place of an unreadable one would have the wrong labels
        for place, (key, array) in zip(places, self.images.read_many(places, replace=False), strict=True):
            if array is None:
                yield None, self.images.unreadable[place]
            else:
                yield to_float(array), key


class TokenStore:
    """The condition tokens of a bound plan's sources, kept in the output folder in parts of whole batches.

    Parts are memory-mapped when they are first asked for.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        count, batch = len(plan.keys), plan.settings.batch_size
        self._size = -(-max(_SOURCES_PER_PART, -(-count // _MAX_PARTS)) // batch) * batch
        self.num_parts = -(-count // self._size)
        self._opened: dict[int, Tensor] = {}

    def has_part(self, number: int) -> bool:
        """Whether the part is there, complete, and of this plan."""
        if not self._path(number).is_file():
            return False
        try:
            with safe_open(self._path(number), framework="pt") as file:
                header = json.loads((file.metadata() or {})["tokens"])
                shape = file.get_slice("tokens").get_shape()
        except (SafetensorError, KeyError, ValueError):
            return False
        return header == self._header(number) and shape[0] == len(self._sources_of(number))

    def encode_part(self, number: int, pipe: DinoDiffusionPipeline, sources: PlannedSources) -> list[str]:
        """Encode the sources of a part and write their tokens in the encoder's type; or say why some cannot be read.

        Batches have one size, so that the tokens follow only from the plan and the images.
        """
        numbers, settings = self._sources_of(number), self.plan.settings
        tokens, problems = [], []
        with deterministic(settings.threads), torch.no_grad():
            for start in numbers[:: settings.batch_size]:
                read = list(sources.read(range(start, min(start + settings.batch_size, numbers.stop))))
                problems += [reason for image, reason in read if image is None]
                if problems:
                    continue  # only to name all of them
                images = [image for image, _ in read]
                padded = images + images[-1:] * (settings.batch_size - len(images))
                tokens.append(pipe.encode_image(padded)[: len(images)].cpu())
        if not problems:
            metadata = {"tokens": json.dumps(self._header(number), sort_keys=True)}
            with atomic_write(self._path(number)) as file:
                file.write(save({"tokens": torch.cat(tokens).contiguous()}, metadata))
        return problems

    def draw(self, indices: Sequence[int], attempt: int = 0) -> Tensor:
        """Tokens `(n, S, D)` of planned images: of their source, or between two of them. The same in each attempt."""
        sources = self.plan.sources[list(indices)]  # (n, 1 or 2)
        embeds = self[sources[:, 0]]  # (n, S, D)
        if self.plan.strategy != "interpolation":
            return embeds
        # float32 holds half precision exactly, and mixes it without further rounding
        ends = embeds.float(), self[sources[:, 1]].float()
        weights = torch.from_numpy(self.plan.fractions[list(indices)]).float()
        return lerp(*ends, weights, restore_norm=self.plan.settings.restore_norm).to(embeds.dtype)

    def __getitem__(self, numbers: np.ndarray) -> Tensor:
        """Tokens `(n, S, D)` of sources by their numbers `(n,)`."""
        return torch.stack([self._part(number // self._size)[number % self._size] for number in numbers.tolist()])

    def _part(self, number: int) -> Tensor:
        if number not in self._opened:
            with safe_open(self._path(number), framework="pt") as file:
                self._opened[number] = file.get_tensor("tokens")
        return self._opened[number]

    def _sources_of(self, number: int) -> range:
        return range(number * self._size, min((number + 1) * self._size, len(self.plan.keys)))

    def _header(self, number: int) -> dict[str, object]:
        return {"plan": self.plan.digest, "part": number}

    def _path(self, number: int) -> Path:
        return self.folder / TOKENS / f"tokens-{number:06d}.safetensors"


class PriorTokens:
    """Condition tokens that a prior draws for the images of a plan: each from the image's number and labels.

    A plan knows all labels of its images, so those of the prior's that an image does not have are absent. Images
    without known labels are drawn from anything.

    Args:
        pipe: The prior.
        guidance_scale: Its guidance.
        num_inference_steps: Its sampling steps.
    """

    num_parts = 0  # there is nothing to encode before

    def __init__(self, pipe: DinoPriorPipeline, guidance_scale: float = 1.0, num_inference_steps: int = 50) -> None:
        self.pipe, self.guidance_scale, self.num_inference_steps = pipe, guidance_scale, num_inference_steps
        self._plan: Plan | None = None

    def settings(self) -> dict[str, float]:
        """What the tokens depend on besides plan and prior."""
        return {"guidance_scale": self.guidance_scale, "num_inference_steps": self.num_inference_steps}

    def of(self, plan: Plan) -> PriorTokens:
        """The same for the images of a plan; SynthesisError if it has labels that the prior does not know."""
        made = PriorTokens(self.pipe, **self.settings())
        made._plan = plan
        known = self.pipe.prior.conditions
        try:
            made._rows = [
                known.encode(own, [name for name in known.labels if name not in own]) for own in plan.label_sets
            ]
        except ValueError as error:
            raise SynthesisError(f"The prior cannot draw what is planned: {error}") from error
        made._rows.append(known.unknown(1))  # number -1: unknown labels
        return made

    def draw(self, indices: Sequence[int], attempt: int = 0) -> Tensor:
        """Tokens `(n, S, D)` of planned images; others in each attempt."""
        plan = self._plan
        rows = [self._rows[number] for number in plan.labels[list(indices)].tolist()]
        columns = zip(*rows, strict=True)
        condition = Condition(*(None if column[0] is None else torch.cat(column) for column in columns))
        self.pipe.set_progress_bar_config(disable=True)
        return self.pipe(
            condition=condition,
            generator=[generator_for(plan.seed, "synthesis tokens", index, attempt) for index in indices],
            **self.settings(),
        ).image_embeds
