"""What the frozen models say of an image, computed for each batch, or once and kept in memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset

from ..conditioner import DinoImageConditioner
from ..data import ImageDataset, Slot, TrainingViews, load_batches
from ..devices import send
from ..latents import VAE, encode_to_moments
from ..pixels import StoredImages, unit_to_vae

__all__ = [
    "CachedViews",
    "FeatureEncoder",
    "Features",
    "Views",
    "cache_in_memory",
    "concatenate",
    "encode_ahead",
    "encode_views",
    "evenly_spread",
    "fit_familiarity",
    "samples_per_batch",
]

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of B images, or of N samples in K views with leading dimensions `(N, K)`.

    Attributes:
        mean: `(B, L, h, w)`, mean of the standardised latent's distribution.
        std: `(B, L, h, w)`, its standard deviation.
        tokens: `(B, S, D)`, the condition.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor


class FeatureEncoder:
    """Encodes batches with the frozen models, or takes the features that come with a batch.

    `device` is where training is. For batches without features both models must be there. Without a VAE only the
    tokens are computed, and mean and deviation are `(B, 0)`: a prior needs no more.
    """

    def __init__(self, vae: VAE | None, conditioner: DinoImageConditioner, device: torch.device | str) -> None:
        self.vae, self.conditioner, self.device = vae, conditioner, device

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Features:
        """Float32 features of a batch of `TrainingViews` (it has `image`) or of `CachedViews` (it has `features`)."""
        if "features" in batch:
            return Features(*(send(part, self.device).float() for part in batch["features"]))
        pixels = send(batch["image"], self.device)  # (B, 1 or 3, H, W) in [0, 1]
        images = StoredImages(pixels)  # made here in their range, which is not looked up on a GPU
        if self.vae is None:
            tokens = self.conditioner.encode(images).float()
            return Features(tokens.new_empty(len(tokens), 0), tokens.new_empty(len(tokens), 0), tokens)
        mean, std = encode_to_moments(self.vae, unit_to_vae(pixels, self.vae.config["in_channels"]).to(self.vae.dtype))
        return Features(mean.float(), std.float(), self.conditioner.encode(images).float())


def encode_ahead(batches: Iterator[dict[str, Any]], encoder: FeatureEncoder) -> Iterator[dict[str, Any]]:
    """Batches of training; on a GPU with their `features`, made while the update of the batch before is running.

    Copies, views and frozen models then have a stream of their own, and are a batch ahead. Features are the same bits
    as `encoder` gives for a batch, and the order is that of `batches`. Elsewhere the batches come as they are.
    """
    device = torch.device(encoder.device)
    if device.type != "cuda":
        yield from batches
        return
    training, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(training)  # which has moved the frozen models there

    def encode_next() -> tuple[dict[str, Any], torch.cuda.Event] | None:
        with torch.cuda.stream(aside):
            if (batch := next(batches, None)) is None:
                return None
            features = encoder(batch)
            return {"key": batch["key"], "position": batch["position"], "features": features}, aside.record_event()

    following = encode_next()
    while following is not None:
        (batch, encoded), following = following, encode_next()
        training.wait_event(encoded)
        for part in batch["features"]:
            part.record_stream(training)  # its memory is free for the next when training is done with it
        yield batch


def encode_views(
    views: TrainingViews,
    encoder: FeatureEncoder,
    samples: Sequence[int],
    num_views: int,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Iterator[tuple[Features, list[str]]]:
    """Features of several views of each of some samples; view k is the one that training shows in epoch k.

    Batches hold whole samples, about `batch_size` views. What is in a batch may change the last bit of a float, so a
    cache that is to equal another bit for bit must be made of the same batches.

    Yields:
        Features `(n, K, ...)` of the next n samples on the CPU, and for each the key of what was shown in its place.

    Raises:
        ValueError: If a feature is not finite.
    """
    together = samples_per_batch(num_views, batch_size)
    blocks = [samples[first : first + together] for first in range(0, len(samples), together)]
    slots = [[Slot(0, 0, index) for index in block] for block in blocks]
    as_they_are = TrainingViews(views.images, None)  # each image is read once for all of its views
    for batch in load_batches(as_they_are, slots, num_workers, encoder.device):
        keys = batch["key"]
        images = batch["image"].repeat_interleave(num_views, dim=0)  # (n K, C, H, W)
        if views.augmentation:
            repeated = [key for key in keys for _ in range(num_views)]
            images = views.augmentation(images, repeated, views.seed, [*range(num_views)] * len(keys))
        parts = [part.cpu().unflatten(0, (-1, num_views)) for part in encoder({"image": images})]
        for part in parts:
            finite = part.flatten(1).isfinite().all(dim=1).tolist()
            if not all(finite):
                raise ValueError(f"The features of {keys[finite.index(False)]} are not finite. Encode in float32?")
        yield Features(*parts), keys


def samples_per_batch(num_views: int, batch_size: int) -> int:
    """How many samples `encode_views` encodes at once."""
    return max(1, batch_size // num_views)


def concatenate(parts: Iterable[Features]) -> Features:
    """Join features along their first dimension."""
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


class CachedViews(Dataset[dict[str, Any]]):
    """Views of every sample whose features are known already; takes the place of `TrainingViews`.

    In epoch e the view is that of epoch `e % num_views`; the latent is still sampled anew each time, from its cached
    distribution.

    Args:
        images: The data set.
        shards: Features `(n, K, ...)`, in memory or memory-mapped: each of n samples, the last of fewer.
        rows: Where in the shards each sample is; in the order of the data set by default.
        shown: Key of what is shown in the place of each sample, which is another one where that cannot be read.
    """

    def __init__(
        self,
        images: ImageDataset,
        shards: Sequence[Features],
        rows: Sequence[int] | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:
        self.images, self.shards = images, shards
        self.keys = images.keys if shown is None else list(shown)
        self.rows = range(len(images)) if rows is None else rows
        self.samples_per_shard, self.num_views = shards[0].mean.shape[:2]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, slot: Slot) -> dict[str, Any]:
        return self.__getitems__([slot])

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """A whole batch at once: `features`, `key` and `position`."""
        features = [self._read(self.rows[slot.index], slot.epoch % self.num_views) for slot in slots]
        return {
            "features": tuple(torch.stack(column) for column in zip(*features, strict=True)),
            "key": [self.keys[slot.index] for slot in slots],
            "position": [slot.position for slot in slots],
        }

    def _read(self, row: int, view: int) -> Features:
        number, place = divmod(row, self.samples_per_shard)
        return Features(*(part[place, view] for part in self.shards[number]))


Views = TrainingViews | CachedViews


def cache_in_memory(
    views: TrainingViews,
    encoder: FeatureEncoder,
    num_views: int,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
) -> CachedViews:
    """Encode a few views of every image now, for arguments as in `encode_views`.

    The processes of an `accelerator` share the work, and each keeps the whole: the same bits for any number of them.
    """
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    together = samples_per_batch(num_views, batch_size)
    starts = range(0, len(views), together)
    own = [index for start in starts[rank::count] for index in range(len(views))[start : start + together]]
    encoded = encode_views(views, encoder, own, num_views, batch_size)
    blocks: list[tuple[Features, list[str]] | None] = []
    for _ in range(0, len(starts), count):  # a block of each process in turn
        block = [next(encoded, None)]
        blocks += block if count == 1 else gather_object(block)
    parts, keys = zip(*filter(None, blocks), strict=True)
    return CachedViews(views.images, [concatenate(parts)], shown=[key for block in keys for key in block])


def evenly_spread(images: ImageDataset, count: int) -> Iterator[Tensor]:
    """About `count` images `(C, H, W)` in [0, 1] from the whole of a set, such as for statistics."""
    for index in range(0, len(images), max(1, len(images) // count)):
        yield images[index]["image"]


def fit_familiarity(
    conditioner: DinoImageConditioner,
    views: Views,
    device: torch.device | str,
    patients_of: Callable[[ImageDataset], Sequence[Hashable]],
    count: int = 2000,
    batch_size: int = 32,
) -> bool:
    """`DinoImageConditioner.fit_familiarity` on about `count` views of the first epoch, evenly spread.

    Views with cached features are not encoded again. `patients_of` says whose the images of a set are. Where there are
    too few images it warns and returns False.
    """
    places = range(0, len(views), max(1, len(views) // count))
    blocks = [[Slot(0, 0, place) for place in places[i : i + batch_size]] for i in range(0, len(places), batch_size)]
    encode = FeatureEncoder(None, conditioner, device)
    keys = views.images.keys
    patients = patients_of(views.images.select([keys[place] for place in places]))
    try:
        tokens = (encode(batch).tokens for batch in load_batches(views, blocks, device=device))
        with torch.compiler.set_stance("force_eager"):  # the batches are not those of training
            conditioner.fit_familiarity(tokens, patients)
    except ValueError as error:
        logger.warning("The model will not tell which images are like its training images. %s", error)
        return False
    return True
