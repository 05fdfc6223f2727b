"""Settings that segment well with a model: noted in its denoiser's config, and the defaults of DiffSeg with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import ModelMixin

__all__ = ["ALL_LAYERS", "DiffSegSettings", "note_settings", "noted_settings"]

ALL_LAYERS = "all"
_NOTE = "_diffseg"  # in the denoiser's config, which diffusers keeps, saves and passes on without reading it


@dataclass(frozen=True)
class DiffSegSettings:
    """Which attention is read, and when its maps are merged; without arguments, what suits most models.

    Attributes:
        timestep: Of the denoising step whose attention is read.
        merge_threshold: In units of the mean divergence between an image's maps.
        layers: Names of self-attention layers or blocks; None: all.

    Raises:
        ValueError: If a value is out of its range or of the wrong type.
    """

    timestep: int = 300
    merge_threshold: float = 0.35
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.timestep, bool) or not isinstance(self.timestep, int) or self.timestep < 0:
            raise ValueError(f"timestep must be an integer of 0 or more, got {self.timestep!r}.")
        if not isinstance(self.merge_threshold, (int, float)) or not self.merge_threshold > 0:  # refuses NaN
            raise ValueError(f"merge_threshold must be a number above 0, got {self.merge_threshold!r}.")
        if self.layers is not None:
            named = isinstance(self.layers, (list, tuple)) and all(isinstance(name, str) for name in self.layers)
            if not named or not self.layers:
                raise ValueError(f"layers must be names of attention layers or blocks, or None, got {self.layers!r}.")
            object.__setattr__(self, "layers", tuple(self.layers))  # lists, as JSON gives them, are welcome

    @property
    def joined_layers(self) -> str:
        """The layers as one text: their names with + between them, or `"all"`."""
        return "+".join(self.layers or [ALL_LAYERS])


def note_settings(denoiser: ModelMixin, settings: DiffSegSettings) -> None:
    """Note settings, which were chosen for its weights, in the config of a UNet or transformer, saved with it."""
    denoiser.register_to_config(**{_NOTE: asdict(settings)})


def noted_settings(config: Mapping[str, Any]) -> DiffSegSettings | None:
    """What `note_settings` noted in a denoiser's config; None without a note.

    ValueError if it is not one of this version.
    """
    noted = config.get(_NOTE)
    if noted is None:
        return None
    try:
        return DiffSegSettings(**noted)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The model's config does not say how to segment ({_NOTE}): {error}") from error
