"""One shard of synthetic images, the unit of work: a function of the plan and the shard's number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.images.encoding import Encoding
from ..data.sharding.manifest import Shard, shard_problem, write_shard
from ..data.stores.archives import INDEX_SUFFIX
from ..data.stores.walk import RECORDS
from ..devices import deterministic
from ..files import read_json, write_json
from ..pipelines import DinoDiffusionPipeline
from ..pixels import unit_to_uint8, with_channels
from ..seeds import derive_seed, generator_for
from .plan import Plan, SynthesisError
from .tokens import PriorTokens, TokenStore

__all__ = ["SPLIT", "Gate", "ShardRecord", "find_record", "make_shard", "read_record", "shard_path"]

SPLIT = "train"


class Gate(Protocol):
    """Decides which images may pass, such as those that are not copies of training images."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images `(n, C, H, W)` in [0, 1] -> `(n,)` bool. The verdict on an image depends only on that image."""

    def fingerprint(self) -> str:
        """The same for two gates only if their verdicts are the same."""


@dataclass(frozen=True)
class ShardRecord:
    """What is noted about a finished shard.

    Attributes:
        plan: Digest of the plan.
        shard: The shard's entry in the manifest.
        refused: How many drawn images the gate refused.
        redrawn, left_out: Numbers of the images that passed in a later attempt, and in none.
        environment: Versions and device that the images were computed with.
    """

    plan: str
    shard: Shard
    refused: int
    redrawn: list[int]
    left_out: list[int]
    environment: dict[str, str]


def make_shard(
    plan: Plan,
    number: int,
    pipe: DinoDiffusionPipeline,
    tokens: TokenStore | PriorTokens,
    folder: Path,
    gate: Gate | None = None,
    on_images: Callable[[int], None] | None = None,
) -> ShardRecord:
    """Generate one shard of a bound plan: the tar, its index and, last, its record. Each appears when it is complete.

    Images that the gate refuses are drawn again with other noise, together and in batches of the same size, up to
    `max_attempts` times. So every byte follows from the plan and the number. `on_images` is called with the number of
    images after each batch of first attempts.
    """
    settings = plan.settings
    encoding = Encoding(format=settings.format, quality=settings.quality)
    drawn: dict[int, tuple[int, Future[bytes]]] = {}
    waiting, refused = list(plan.shard(number)), 0
    # files are encoded while the next batch is sampled
    with deterministic(settings.threads), _quiet(pipe), ThreadPoolExecutor(1) as pool:
        for attempt in range(settings.max_attempts):
            again = []
            for start in range(0, len(waiting), settings.batch_size):
                batch = waiting[start : start + settings.batch_size]
                images = _sample(plan, batch, attempt, pipe, tokens)
                passed = _verdicts(gate, images)
                for index, image, good in zip(batch, images, passed, strict=True):
                    if good:
                        pixels = image[0] if len(image) == 1 else image.movedim(0, -1)  # (H, W) or (H, W, 3)
                        drawn[index] = attempt, pool.submit(encoding.encode, pixels.numpy())
                    else:
                        again.append(index)
                if on_images is not None and attempt == 0:
                    on_images(len(batch))
            waiting, refused = again, refused + len(again)
            if not waiting:
                break
    shard = write_shard(shard_path(folder, number), SPLIT, _samples(plan, drawn, settings.format))
    redrawn = sorted(index for index, (attempt, _) in drawn.items() if attempt)
    record = ShardRecord(plan.digest, shard, refused, redrawn, waiting, _environment(pipe))
    write_json(_record_path(folder, number), asdict(record))
    return record


def read_record(plan: Plan, number: int, folder: Path) -> ShardRecord | None:
    """The record of a shard; None if there is none, or one of another plan or shard."""
    try:
        content = read_json(_record_path(folder, number))
        record = ShardRecord(shard=Shard(**content.pop("shard")), **content)
        expected = shard_path(folder, number).name, len(set(plan.shard(number)) - set(record.left_out))
        fits = (record.plan, record.shard.name, record.shard.samples) == (plan.digest, *expected)
        known = fits and {*record.redrawn, *record.left_out} <= set(plan.shard(number)) and record.refused >= 0
        known = known and isinstance(record.environment, dict)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if known else None


def find_record(plan: Plan, number: int, folder: Path) -> ShardRecord | None:
    """The record of a shard that is there with its index and the SHA-256 that was noted; None if it must be made."""
    record = read_record(plan, number, folder)
    if record is None or not Path(f"{shard_path(folder, number)}{INDEX_SUFFIX}").is_file():
        return None
    return None if shard_problem(folder, asdict(record.shard)) else record


def _sample(
    plan: Plan, indices: Sequence[int], attempt: int, pipe: DinoDiffusionPipeline, tokens: TokenStore | PriorTokens
) -> Tensor:
    """Sample n images, at most one batch, as uint8 `(n, C, H, W)` on the CPU.

    A smaller batch is padded, since sums depend on its size. Each attempt, counted from 0, has other noise.
    """
    settings = plan.settings
    padded = [*indices, *indices[-1:] * (settings.batch_size - len(indices))]
    images = pipe(
        image_embeds=tokens.draw(padded, attempt),  # (B, S, D)
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        eta=settings.eta,
        generator=[generator_for(*_noise_of(plan, index, attempt)) for index in padded],
        output_type="pt",
    ).images[: len(indices)]
    if settings.grayscale:
        images = with_channels(images, 1)
    return unit_to_uint8(images.float()).cpu()


def _environment(pipe: DinoDiffusionPipeline) -> dict[str, str]:
    """What the bits of a computation depend on besides its inputs."""
    import diffusers
    import PIL

    device = pipe.denoiser.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "pillow": PIL.__version__}


@contextmanager
def _quiet(pipe: DinoDiffusionPipeline) -> Iterator[None]:
    """Without a progress bar for each batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _noise_of(plan: Plan, index: int, attempt: int) -> tuple[int | str, ...]:
    return plan.seed, "synthesis", index, attempt


def _verdicts(gate: Gate | None, images: Tensor) -> list[bool]:
    """Which images uint8 `(n, C, H, W)` may pass. The gate sees them as they are stored."""
    if gate is None:
        return [True] * len(images)
    verdicts = torch.as_tensor(gate(images.float() / 255))
    if verdicts.shape != (len(images),) or verdicts.dtype != torch.bool:
        raise SynthesisError(
            f"The gate must answer with {len(images)} bool, one for each image, got {tuple(verdicts.shape)} of "
            f"{verdicts.dtype}."
        )
    return verdicts.tolist()


def _samples(
    plan: Plan, drawn: dict[int, tuple[int, Future[bytes]]], extension: str
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each image, in the order of the plan."""
    for index in sorted(drawn):
        planned, (attempt, content) = plan[index], drawn[index]
        soft = plan.exponent is not None
        facts: dict[str, Any] = {
            "source": "synthetic",
            **({"probabilities": planned.probabilities} if soft else {"labels": planned.labels}),
            "strategy": plan.strategy,
            "sources": planned.sources,
            "fraction": planned.fraction,
            "seed": derive_seed(*_noise_of(plan, index, attempt)),
            "attempt": attempt,
            "split": SPLIT,
        }
        yield planned.key, {extension: content.result(), "json": json.dumps(facts, separators=(",", ":")).encode()}


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard of a set is."""
    return folder / f"synthetic-{number:06d}.tar"


def _record_path(folder: Path, number: int) -> Path:
    return folder / RECORDS / f"{shard_path(folder, number).name}.json"
