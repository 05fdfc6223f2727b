"""Features on disk: written once, in shards of safetensors that training memory-maps.

A cache is a folder: `features-000000.safetensors`, ... with arrays `mean`, `std` and `tokens` of `(n, K, ...)`, n
samples in K views each; `keys.txt`, the samples' keys in the order of the shards; and `manifest.json`, which is
written last. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..conditioner import DinoImageConditioner
from ..data import ImageDataset, TrainingViews
from ..files import atomic_write, read_json, remove_partials, write_json
from ..fingerprints import as_json, fingerprint_model, hash_of
from ..frozen import differences, require_same
from ..latents import VAE
from .checkpoints import MANIFEST, describe_file
from .features import CachedViews, FeatureEncoder, Features, concatenate, encode_views, samples_per_batch

__all__ = ["FeatureCacheError", "Recipe", "open_feature_cache", "write_feature_cache"]

logger = logging.getLogger(__name__)

KEYS = "keys.txt"
# Raised also when the same recipe begins to give other features.
_FORMAT = 1
_NUM_PROBES = 3


class FeatureCacheError(ValueError):
    """A folder of features is not complete, or not of what is to be trained. The message says what differs."""


@dataclass(frozen=True)
class Recipe:
    """What features are made with: of the same images, equal recipes give equal features.

    Models are told by their `fingerprint_model`. Without an augmentation the images are taken as they are. `seed` is
    that of the views, `num_views` their number for each sample, K.
    """

    conditioner: str
    vae: str
    preprocessing: dict[str, Any]
    augmentation: dict[str, Any] | None
    seed: int
    num_views: int

    @classmethod
    def of(cls, vae: VAE | None, conditioner: DinoImageConditioner, views: TrainingViews, num_views: int) -> Recipe:
        """The recipe of these models and views; call it before the models are cast."""
        preprocessing, augmentation = views.images.preprocessing, views.augmentation
        return cls(
            conditioner=fingerprint_model(conditioner),
            vae=fingerprint_model(vae) if vae is not None else "none",
            preprocessing=as_json({**asdict(preprocessing), "fingerprint": preprocessing.fingerprint()}),
            augmentation=as_json(asdict(augmentation)) if augmentation else None,
            seed=views.seed,
            num_views=num_views,
        )


def write_feature_cache(
    folder: str | Path,
    recipe: Recipe,
    views: TrainingViews,
    encoder: FeatureEncoder,
    accelerator: Accelerator,
    *,
    dtype: torch.dtype = torch.float16,
    samples_per_shard: int = 256,
    batch_size: int = 32,
    num_workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Encode K views of every sample into a folder; every process must call this, and each makes its share of shards.

    Shards that are there already are kept, so an interrupted run goes on where it stopped. What a shard holds does
    not depend on the number of processes.

    Args:
        folder: Where the cache shall be; all processes must see it.
        recipe: Of `encoder`, `views` and the number of views, K.
        views: The views to encode.
        encoder: What encodes them, about `batch_size` views at once.
        accelerator: Tells the processes apart; each loads images in `num_workers` processes.
        dtype: Type to store: `torch.float16`, or `torch.float32` for features as exact as those of a batch.
        samples_per_shard: Samples in a file; rounded down to what is encoded together.
        say: Called with a line after each shard.

    Returns:
        The manifest.

    Raises:
        FeatureCacheError: If the folder holds other features, or a value does not fit into `dtype`.
        ValueError: If two samples have the same key.
    """
    folder, keys = Path(folder), views.images.keys
    if repeated := len(keys) - len(set(keys)):
        raise ValueError(f"{repeated} samples have the key of another one: features are found by their key.")
    facts = {"format": _FORMAT, "recipe": asdict(recipe), "dtype": str(dtype).removeprefix("torch.")}
    if (folder / MANIFEST).is_file():
        manifest = _read_manifest(folder)
        _require_same(manifest, {**facts, "keys_sha256": _hash_lines(keys)}, folder)
        (damaged,) = broadcast_object_list([_damaged(folder, manifest) if accelerator.is_main_process else None])
        if not damaged:
            return manifest
        if accelerator.is_main_process:
            (folder / MANIFEST).unlink()  # first: without it nobody trains on what is left
            for name in damaged:
                say(f"{folder / name} is damaged and is made anew")
                (folder / name).unlink(missing_ok=True)
    if accelerator.is_main_process:
        remove_partials(folder)
    accelerator.wait_for_everyone()
    together = samples_per_batch(recipe.num_views, batch_size)
    samples_per_shard = max(1, samples_per_shard // together) * together
    starts = range(0, len(keys), samples_per_shard)
    shards = []
    for number in range(accelerator.process_index, len(starts), accelerator.num_processes):
        samples = range(starts[number], min(starts[number] + samples_per_shard, len(keys)))
        path = folder / f"features-{number:06d}.safetensors"
        header = {**facts, "keys_sha256": _hash_lines(keys[index] for index in samples)}
        kept = _read_header(path, header)
        if not kept:
            encoded = encode_views(views, encoder, samples, recipe.num_views, batch_size, num_workers)
            kept = _write_shard(path, header, [keys[index] for index in samples], encoded, dtype)
        shards.append({"name": path.name, "samples": len(samples), **describe_file(path), **kept})
        say(f"{path}: {len(samples)} samples in {recipe.num_views} views")
    shards = sorted(gather_object(shards), key=lambda shard: shard["name"])
    manifest = {**facts, "num_samples": len(keys), "keys_sha256": _hash_lines(keys), "shards": shards}
    if accelerator.is_main_process:
        readable = sorted(set(keys) - _substituted(manifest))
        manifest["probes"] = _probe(views.images, readable[:: -(-len(readable) // _NUM_PROBES)])
        with atomic_write(folder / KEYS) as file:
            file.write("".join(f"{key}\n" for key in keys).encode())
        write_json(folder / MANIFEST, manifest)
    accelerator.wait_for_everyone()
    return _read_manifest(folder)


def open_feature_cache(
    folder: str | Path,
    recipe: Recipe,
    images: ImageDataset,
    *,
    only_tokens: bool = False,
    share: tuple[int, int] = (0, 1),
) -> CachedViews:
    """Open a cache for training on all of its samples, or some of them.

    The seed of the views is the cache's own: runs of several seeds may share one.

    Args:
        folder: A folder that `write_feature_cache` has completed.
        recipe: What the features have to be made with, the seed apart. `num_views` 0 takes as many as there are.
        images: What to train on. A few are read, to see that they are those of the cache.
        only_tokens: Leave the latents out, and do not ask which VAE they are of.
        share: Which of how many processes this is. Each reads its share of the files once, to compare their hashes.

    Returns:
        The views, memory-mapped: what is read belongs to the operating system's cache, not to this process.

    Raises:
        FeatureCacheError: If the cache is not complete or does not match; the message says in what.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    theirs = Recipe(**manifest["recipe"])
    recipe = replace(recipe, seed=theirs.seed, num_views=recipe.num_views or theirs.num_views)
    recipe = replace(recipe, vae=theirs.vae) if only_tokens else recipe
    lines = differences(asdict(theirs), asdict(recipe))
    known, keys = _read_keys(folder, manifest), images.keys
    if missing := sorted(set(keys) - set(known)):
        lines.append(f"samples: {len(missing)} of {len(keys)} are not there, such as {', '.join(missing[:3])}")
    _refuse(folder, lines)
    probes = {key: manifest["probes"][key] for key in set(keys) & set(manifest["probes"])}
    if changed := [key for key, value in _probe(images, probes).items() if value != probes[key]]:
        _refuse(folder, [f"images: {', '.join(changed)} shows something else there than here"])
    number, count = share
    if damaged := _damaged(folder, manifest, slice(number, None, count)):
        raise FeatureCacheError(
            f"{folder / damaged[0]} is missing or cut short, or was changed. Make the cache again: it keeps what is "
            "whole."
        )
    paths = [folder / shard["name"] for shard in manifest["shards"]]
    substituted = _substituted(manifest)
    shown = [images[index]["key"] if key in substituted else key for index, key in enumerate(keys)]
    row_of = {key: row for row, key in enumerate(known)}
    rows = None if shown == known else [row_of[key] for key in shown]
    return CachedViews(images, _MappedShards(paths, only_tokens), rows, shown)


class _MappedShards(Sequence[Features]):
    """Shards that are memory-mapped when they are first asked for, by each process for itself."""

    def __init__(self, paths: list[Path], only_tokens: bool = False) -> None:
        self.paths, self.only_tokens = paths, only_tokens
        self._opened: dict[int, Features] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Features:
        if number not in self._opened:
            with safe_open(self.paths[number], framework="pt") as file:
                tokens = file.get_tensor("tokens")
                none = tokens.new_empty(*tokens.shape[:2], 0)
                latents = (none, none) if self.only_tokens else map(file.get_tensor, ("mean", "std"))
                self._opened[number] = Features(*latents, tokens)
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        return {
            "paths": self.paths,
            "only_tokens": self.only_tokens,
            "_opened": {},
        }  # loader workers that are spawned map for themselves


def _write_shard(
    path: Path,
    header: dict[str, Any],
    keys: list[str],
    encoded: Iterable[tuple[Features, list[str]]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write one file. Returns what is remarkable about it: which samples are shown in the place of unreadable ones."""
    parts, shown = zip(*encoded, strict=True)
    features = Features(*(part.to(dtype) for part in concatenate(parts)))
    for name, part in features._asdict().items():
        if not part.isfinite().all():
            raise FeatureCacheError(f"The {name} of {path.name} does not fit into {dtype}: store float32.")
    pairs = zip(keys, (key for block in shown for key in block), strict=True)
    remarks = {"substitutes": {key: used for key, used in pairs if key != used}}
    # One entry only: safetensors gives several in an order that changes, and the file is to be the same each time.
    metadata = {"cache": json.dumps({**header, **remarks}, sort_keys=True)}
    with atomic_write(path) as file:
        file.write(save({name: part.contiguous() for name, part in features._asdict().items()}, metadata))
    return remarks


def _read_header(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The remarks of a shard that is there already; None if it has to be written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["cache"])
    except (SafetensorError, KeyError, ValueError):
        logger.warning("%s is damaged and is made anew.", path)
        return None
    _require_same(header, expected, path)
    return {"substitutes": header["substitutes"]}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / MANIFEST, error=FeatureCacheError)
    except FileNotFoundError as error:
        raise FeatureCacheError(
            f"{folder} does not hold complete features: it has no {MANIFEST}. Let the run that makes them finish."
        ) from error
    try:
        if manifest["format"] != _FORMAT:
            raise FeatureCacheError(
                f"{folder} is of format {manifest['format']}, this version reads {_FORMAT}. Make it anew."
            )
        Recipe(**manifest["recipe"])
        names = [shard["name"] for shard in manifest["shards"]]
        plain = names == [f"features-{number:06d}.safetensors" for number in range(len(names))]
        counts = [count for shard in manifest["shards"] for count in (shard["samples"], shard["size"])]
        texts = [shard["sha256"] for shard in manifest["shards"]] + [manifest["keys_sha256"]]
        tables = [shard["substitutes"] for shard in manifest["shards"]] + [manifest["probes"]]
        if not names or not plain or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("its shards are not named or counted as they should be")
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(table, dict) for table in tables):
            raise TypeError("its hashes, substitutes or probes are not what they should be")
        if sum(shard["samples"] for shard in manifest["shards"]) != manifest["num_samples"]:
            raise ValueError("the samples of its shards do not add up")
    except FeatureCacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureCacheError(f"The {MANIFEST} of {folder} is damaged: {error!r}") from error
    return manifest


def _read_keys(folder: Path, manifest: dict[str, Any]) -> list[str]:
    try:
        keys = (folder / KEYS).read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise FeatureCacheError(f"{folder / KEYS} cannot be read: {error}") from error
    if _hash_lines(keys) != manifest["keys_sha256"] or len(keys) != manifest["num_samples"]:
        raise FeatureCacheError(f"{folder / KEYS} was changed: it is not the file that the {MANIFEST} describes.")
    return keys


def _damaged(folder: Path, manifest: dict[str, Any], part: slice = slice(None)) -> list[str]:
    """The names of files that are not, byte for byte, those of the manifest."""

    def is_damaged(shard: dict[str, Any]) -> bool:
        path = folder / shard["name"]
        expected = {name: shard[name] for name in ("size", "sha256")}
        return not path.is_file() or path.stat().st_size != shard["size"] or describe_file(path) != expected

    shards = manifest["shards"][part]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        return [shard["name"] for shard, bad in zip(shards, pool.map(is_damaged, shards), strict=True) if bad]


def _require_same(begun: dict[str, Any], now: dict[str, Any], place: Path) -> None:
    """Refuse to write where features of other settings or of other samples are."""
    names = {name: {"keys_sha256": "hash of the samples' keys"}.get(name, name) for name in now}
    theirs, ours = ({names[name]: settings.get(name) for name in now} for settings in (begun, now))
    require_same(theirs, ours, place, FeatureCacheError)


def _refuse(folder: Path, differences: list[str]) -> None:
    """Refuse to train on features that are not those of the run."""
    if not differences:
        return
    advice = "Train with the settings that the features were made with, or make others."
    if any(line.startswith("conditioner") for line in differences):
        advice += f" The conditioner that they were made with is in {folder / 'conditioner'}."
    lines = "\n- ".join([f"The features in {folder} are not of this run:", *differences])
    raise FeatureCacheError(f"{lines}\n{advice}")


def _substituted(manifest: dict[str, Any]) -> set[str]:
    """Keys of the samples that could not be read. What is stored in their place need not be part of a smaller set."""
    return {key for shard in manifest["shards"] for key in shard["substitutes"]}


def _probe(images: ImageDataset, keys: Iterable[str]) -> dict[str, str]:
    """Hashes of the prepared images of a few samples: keys such as 000001 name images of many data sets."""
    numbers = {key: number for number, key in enumerate(images.keys)}
    return {key: hash_of(images[numbers[key]]["image"])[:16] for key in keys}


def _hash_lines(lines: Iterable[str]) -> str:
    return hash_of("\n".join(lines))
