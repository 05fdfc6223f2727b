"""Random numbers that depend only on what they are drawn for.

A draw keyed by (seed, purpose, sample) is the same on one process and on eight, on the first run and on a resumed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derive_seed", "generator_for", "seeded"]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) of what a draw is for, such as `(seed, "noise", position)`, the same on every machine.

    Order and types matter: 1 is not "1".
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator that starts at `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """For what draws from the global generators, such as new weights or dropout; they are left as they were."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield
