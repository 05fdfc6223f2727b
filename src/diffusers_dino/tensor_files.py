"""Files of tensors with a description: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import atomic_write
from .fingerprints import hash_of

__all__ = ["read_tensors", "refusing", "write_tensors"]

_HASH = "sha256"  # a tensor: in the header, two entries would come in any order


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a `.safetensors` file with at most one entry of description; equal content gives equal bytes."""
    metadata = {name: json.dumps(value) for name, value in description.items()}
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content[_HASH] = torch.frombuffer(bytearray.fromhex(_hash(content, metadata)), dtype=torch.uint8)
    with atomic_write(Path(path)) as file:
        file.write(save(content, metadata=metadata or None))


def read_tensors(
    path: str | os.PathLike[str], kind: str, *names: str, optional: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors and the description that `write_tensors` wrote, also from before it wrote a hash.

    FileNotFoundError if there is no such file; a ValueError that says the file is not `kind`, or is damaged, for
    anything else that `write_tensors` has not written.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not {kind}: it is a folder, a pipe or a device.")
    with refusing(path, kind):
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
        description = {name: json.loads(text) for name, text in metadata.items()}
        found = tensors.pop(_HASH, None)
        if set(tensors) - {optional} != set(names):
            raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
        if found is not None and bytes(found.tolist()).hex() != _hash(tensors, metadata):
            raise ValueError("its content has changed since it was written")
    return tensors, description


@contextmanager
def refusing(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turn whatever a damaged file leads to into a ValueError that names the file."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{path} is not {kind}, or is damaged: its description is nested too deeply.") from error
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not {kind}, or is damaged: {error}.") from error


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    parts = [(name, tensor.dtype, tuple(tensor.shape), tensor) for name, tensor in sorted(tensors.items())]
    return hash_of(sorted(metadata.items()), *(part for entry in parts for part in entry))
