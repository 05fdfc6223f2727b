"""How a model was trained and on what, kept beside it for cards that are written later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

__all__ = ["RECORD_FILE", "TrainingRecord"]

RECORD_FILE = "training_record.json"


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained and on what.

    Attributes:
        facts: By name, as a card may tell them: images, updates, batch size, learning rate, ...
        base_models: What it was made from: the encoder, the VAE, the UNet's start; for a LoRA, the pipeline.
        datasets: Data sets of the Hub that it was trained on.
        sources: Data sets that the images are from, as `diffusers_dino.data.sharding.recorded_sources` reads them.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    sources: Sequence[Mapping[str, Any]] = ()

    def save(self, folder: str | os.PathLike) -> None:
        """Write `training_record.json`."""
        write_json(Path(folder) / RECORD_FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> TrainingRecord:
        """Read what `save` wrote; an empty record if there is none. A damaged file is a `ValueError`."""
        path = Path(folder) / RECORD_FILE
        try:
            return cls(**read_json(path))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a record of a training: {error}.") from error
