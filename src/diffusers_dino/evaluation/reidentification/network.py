"""A small Siamese network that tells whether two images are of one patient.

Source: Packhäuser et al. 2022 (Scientific Reports 12:14851): both images go through one network, and a linear layer
scores the absolute difference of their embeddings; the loss is the binary cross-entropy of pairs of one patient and of
two, which count as much. In place of their ResNet-50 at 256 px there are three convolutions at 64 px, which see local
contrast: exposure differs between films of one patient. All pairs of a batch are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.images.augmentation import Augmentation
from ...devices import deterministic
from ...metrics.extractors.thumbnails import local_contrast
from ...pixels import resize_unit, with_channels
from ...seeds import derive_seed, generator_for, seeded

__all__ = ["SIDE", "SiameseNetwork", "prepare", "train_siamese"]

SIDE = 64
_WIDTH, _DIM = 16, 64
_PATIENTS = 32  # of an update, and as many other images
_LEARNING_RATE, _WEIGHT_DECAY = 1e-3, 0.05


def prepare(images: Tensor) -> Tensor:
    """Images `(N, C, H, H)` in [0, 1] as the network takes them: gray `(N, 1, 64, 64)`."""
    return resize_unit(with_channels(images, 1), SIDE, "bilinear")


class SiameseNetwork(nn.Module):
    """Embeds images `(N, 1, 64, 64)` in [0, 1] as `(N, 64)`; `score` compares two sets of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, _WIDTH, 2 * _WIDTH, 4 * _WIDTH)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, k, 2, k // 2, bias=False), nn.GroupNorm(4, b), nn.ReLU())
                for a, b, k in zip(widths, widths[1:], (5, 3, 3), strict=False)
            ),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * widths[-1], _DIM),
        )
        self.head = nn.Linear(_DIM, 1)
        nn.init.constant_(self.head.weight, -0.2)  # the nearer, the likelier
        nn.init.constant_(self.head.bias, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(local_contrast(images))

    def score(self, first: Tensor, second: Tensor) -> Tensor:
        """Log odds `(N, M)` that images are of one patient, from embeddings `(N, D)` and `(M, D)`."""
        return self.head((first[:, None] - second[None]).abs()).squeeze(-1)


def train_siamese(
    images: Tensor, patients: Sequence[str], steps: int, seed: int = 0, device: torch.device | str = "cpu"
) -> SiameseNetwork:
    """Train on images `(N, 1, 64, 64)` of patients, two or more of whom have several; a function of its arguments."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, patient in enumerate(patients):
        rows[patient].append(row)
    several, single = ([own for own in rows.values() if (len(own) > 1) == many] for many in (True, False))
    if len(several) < 2:
        raise ValueError(f"A network learns from two patients or more with several images, got {len(several)}.")
    random = generator_for(seed, "pairs")

    def draw(choices: list[list[int]], count: int, of_each: int) -> Tensor:
        chosen = [choices[i] for i in torch.randperm(len(choices), generator=random)[:count].tolist()]
        picked = [[own[i] for i in torch.randperm(len(own), generator=random)[:of_each].tolist()] for own in chosen]
        return torch.tensor(picked, dtype=torch.long).reshape(len(chosen), of_each)

    with deterministic(threads=1), seeded(derive_seed(seed, "weights")):
        network, augmentation = SiameseNetwork().to(device), Augmentation(0.0, 0.03, 0.05, (0.9, 1.1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            pairs, others = draw(several, _PATIENTS, 2), draw(single, _PATIENTS, 1)
            shown = images[torch.cat([pairs.T.flatten(), others.flatten()])]
            shown = augmentation.apply(shown, torch.rand(len(shown), 7, generator=random)).to(device)
            first, second = network(shown).split([len(pairs), len(shown) - len(pairs)])
            scores = network.score(first, second)  # (P, P + others): the partner of each is on the diagonal
            same = torch.eye(*scores.shape, device=device)
            weights = torch.where(same > 0, 0.5 / len(pairs), 0.5 / (same.numel() - len(pairs)))
            loss = F.binary_cross_entropy_with_logits(scores, same, weights, reduction="sum")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)
