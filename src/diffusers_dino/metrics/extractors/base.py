"""What every feature extractor is: a description that travels with its features, and one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FeatureExtractor", "FeatureSpec"]

_ROUNDING = 1e-4  # how far a pixel may leave [0, 1] by rounding before it is refused


@dataclass(frozen=True)
class FeatureSpec:
    """How features were computed. Features compare only with those of an equal description.

    Attributes:
        extractor: Name of the extractor, as `open_extractor` takes it.
        layer: What of the network is the feature.
        dim: Width of a feature, D.
        input_size: Side in pixels of the images that the network sees.
        pixel_range: Channels and values that it sees, as `"gray, [-1024, 1024]"`.
        resize: How images of another size are brought to it, and whether that is antialiased.
        weights_sha256: Of the weight file; None where there are no weights.
    """

    extractor: str
    layer: str
    dim: int
    input_size: int
    pixel_range: str
    resize: str
    weights_sha256: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureSpec:
        """Read what `to_dict` wrote; ValueError if it is something else."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or (wrong := known ^ set(values)):
            found = ", ".join(sorted(wrong)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"A description of features has missing or unknown keys: {found}.")
        for name, value in values.items():
            kind = int if name in ("dim", "input_size") else str
            if type(value) is not kind and not (name == "weights_sha256" and value is None):
                raise ValueError(f"A description of features has {name} = {value!r}, which is not {kind.__name__}.")
        return cls(**values)

    def require_same(self, other: FeatureSpec) -> None:
        """ValueError that names each field that differs."""
        own, others = self.to_dict(), other.to_dict()
        if unequal := [f"{name}: {own[name]!r} and {others[name]!r}" for name in own if own[name] != others[name]]:
            raise ValueError(
                f"Features of different extractors do not compare. They differ in {'; '.join(unequal)}. Extract both "
                "sets with the same extractor and weights."
            )


class FeatureExtractor:
    """Images to feature vectors by one frozen network.

    Args:
        spec: What the features will be.
        network: Images `(N, 1 or 3, H, H)` in [0, 1] to features `(N, spec.dim)`; brings them to its own size and
            range. A module is moved to `device`, frozen and put in evaluation mode.
        device: Where it computes.
    """

    def __init__(
        self, spec: FeatureSpec, network: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._network = network
        if isinstance(network, nn.Module):
            self._network = network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `(N, D)` float32 on the CPU of images `(N, C, H, H)` in [0, 1], with C = 1 or 3.

        ValueError if the images are of another shape or range, or hold NaN; or a feature is not finite.
        """
        images = _checked(images)
        if not len(images):
            return torch.empty(0, self.spec.dim)
        features = self._network(images.to(self.device)).float().cpu()  # (N, D)
        if tuple(features.shape) != (len(images), self.spec.dim):
            raise ValueError(
                f"The extractor {self.spec.extractor} says it gives {self.spec.dim} features an image, and gave "
                f"{tuple(features.shape)} for {len(images)}."
            )
        if not torch.isfinite(features).all():
            number = int(features.isfinite().all(dim=1).long().argmin())
            raise ValueError(
                f"The extractor {self.spec.extractor} gave NaN or infinite features, first for image {number} of the "
                "batch: check its weights."
            )
        return features


def _checked(images: Tensor) -> Tensor:
    """Images `(N, 1 or 3, H, H)` as float32, clipped to [0, 1] where rounding left it."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Features are of floating images in [0, 1], got {found}: see diffusers_dino.pixels.to_unit.")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise ValueError(f"Expected square images (N, 1 or 3, H, H), got {tuple(images.shape)}: crop them first.")
    if not images.numel():
        return images
    low, high = (value.item() for value in torch.aminmax(images))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # also false for NaN
        raise ValueError(f"Images must be in [0, 1] and finite, got values in [{low:.4g}, {high:.4g}].")
    return images.float().clamp(0, 1)
