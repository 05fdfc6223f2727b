"""Self-distillation without labels (DINO, Caron et al. 2021): crops, the pair of networks, loss, signs of collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersModel

__all__ = ["Crops", "DistillationNetwork", "cross_view_loss", "effective_rank", "update_teacher"]


@dataclass(frozen=True)
class Crops:
    """Random crops of a batch with random exposure, which depend only on the batch and the generator.

    No flip: it would exchange the patient's sides. Made for a whole batch at once, on the device it is on.

    Args:
        size: Side of the crops in pixels.
        scale: Range of a crop's area, as a fraction of the image's.
        ratio: Largest ratio of a crop's sides, at least 1.
        exposure: Contrast is multiplied by up to `exp(+-exposure)`, and brightness shifted by up to half of it.

    Raises:
        ValueError: If a value is out of its range.
    """

    size: int
    scale: tuple[float, float]
    ratio: float = 1.16
    exposure: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # a YAML file gives a list
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"The scale of crops is two fractions in (0, 1], smallest first, got {self.scale}.")
        if self.size < 1 or self.ratio < 1 or self.exposure < 0:
            raise ValueError(f"Crops need a size and ratio of at least 1 and an exposure of at least 0, got {self}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crop each image once: `(B, C, H, W)` in [0, 1] -> `(B, C, size, size)` in [0, 1]."""
        draws = torch.rand(6, len(images), generator=generator).to(images)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[0]
        ratio = torch.exp((2 * draws[1] - 1) * math.log(self.ratio))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        theta = images.new_zeros(len(images), 2, 3)  # maps the crop's [-1, 1] to the image's
        theta[:, 0, 0], theta[:, 1, 1] = width, height
        theta[:, 0, 2] = (2 * draws[2] - 1) * (1 - width)
        theta[:, 1, 2] = (2 * draws[3] - 1) * (1 - height)
        shrink = int(images.shape[-1] * math.sqrt(self.scale[1]) / self.size)
        if shrink > 1:  # bilinear sampling by itself would alias
            images = F.avg_pool2d(images, shrink)
        grid = F.affine_grid(theta, [*images.shape[:2], self.size, self.size], align_corners=False)
        crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        contrast = torch.exp((2 * draws[4] - 1) * self.exposure).view(-1, 1, 1, 1)
        brightness = ((draws[5] - 0.5) * self.exposure).view(-1, 1, 1, 1)
        middle = crops.mean(dim=(1, 2, 3), keepdim=True)
        return ((crops - middle) * contrast + middle + brightness).clamp(0, 1)


class DistillationNetwork(nn.Module):
    """An encoder and a projection head on its global tokens: the student, and once more the teacher.

    The head maps the class token and the registers side by side, not their mean, to `(N, K)`: each token must carry
    something of its own, and all of them become a condition. `mean` and `std` standardise pixels in [0, 1].
    """

    def __init__(self, encoder: Dinov2WithRegistersModel, head: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.mean, self.std = mean, std

    @staticmethod
    def global_width(encoder: Dinov2WithRegistersModel) -> int:
        """Number of features of all global tokens together."""
        return encoder.config.hidden_size * (1 + encoder.config.num_register_tokens)

    def embed(self, crops: Tensor) -> Tensor:
        """Global tokens side by side: `(N, 1 or 3, H, W)` in [0, 1] -> `(N, tokens * width)`."""
        pixel_values = ((crops - self.mean) / self.std).expand(-1, 3, -1, -1)
        tokens = self.encoder(pixel_values).last_hidden_state  # (N, 1 + registers + patches, width); CLS first
        return tokens[:, : 1 + self.encoder.config.num_register_tokens].flatten(1)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embed batches of crops `(N_i, 1 or 3, H_i, W_i)` in [0, 1] that may differ in size.

        Gives features of the first batch `(N_0, tokens * width)`, and logits of all crops in order `(sum N_i, K)`.
        """
        features = [self.embed(crops) for crops in views]
        return features[0], self.head(torch.cat(features))


def cross_view_loss(student_logits: Tensor, targets: Tensor, num_images: int, temperature: float) -> Tensor:
    """Cross-entropy of each student view with each teacher view of the same image, other than the view itself.

    Args:
        student_logits: `(S * B, K)`: S views of B images, view by view; the teacher's views first.
        targets: `(T * B, K)`: distributions that the teacher gives its T views.
        num_images: B.
        temperature: Of the student's softmax.

    Returns:
        A scalar: the mean over images and pairs of views. An untrained student has about ln K.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1).unflatten(0, (-1, num_images))
    targets = targets.unflatten(0, (-1, num_images))
    entropies = -torch.einsum("tbk,sbk->ts", targets, log_student) / num_images  # (T, S)
    pairs = 1 - torch.eye(*entropies.shape, device=entropies.device)
    return (entropies * pairs).sum() / pairs.sum()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's weights towards the student's: `teacher <- momentum * teacher + (1 - momentum) * student`."""
    own, other = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(own, other, 1 - momentum)


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the normalised eigenvalues of the correlation matrix (Roy & Vetterli 2007).

    Of features `(N, D)`, N >= 2. Between 1 (all features are one) and the smaller of N - 1 and D. Features that do not
    vary are left out.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"The effective rank needs features (N, D) with N >= 2, got {tuple(features.shape)}.")
    features = features.double()
    spread = features.std(dim=0)
    features = ((features - features.mean(dim=0)) / spread)[:, spread > 1e-6]
    if not features.shape[1]:
        return 1.0
    share = torch.linalg.svdvals(features).square()
    share = share / share.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).item()
