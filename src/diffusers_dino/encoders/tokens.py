"""What happens to an encoder's tokens before they are a condition: choice, standardisation, projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Encoder, ExactBuffers

__all__ = ["TOKENS", "Moments", "TokenHead", "semi_orthogonal"]

TOKENS = ("global", "cls", "patch", "all")
_MIN_RELATIVE_STD = 0.01


class TokenHead(ExactBuffers):
    """Choose the tokens of one encoder, standardise them, and project them: all in float32.

    `mean` and `std` are `(G' + P', width)`: a row for each global token that is kept, then one that all patches share.
    `projection` is `(projection_dim, width)` or None. A ValueError if the encoder lacks the tokens that are asked for.
    """

    exact_buffers = ("mean", "std", "projection")

    def __init__(self, encoder: Encoder, tokens: str, projection: Tensor | None) -> None:
        super().__init__()
        if tokens == "cls" and not encoder.has_class_token:
            raise ValueError(f"The encoder {encoder.spec.source} has no class token: use tokens='patch'.")
        if tokens == "global" and not encoder.num_global:
            raise ValueError(f"The encoder {encoder.spec.source} has no global tokens: use tokens='patch'.")
        self.num_global = {"global": encoder.num_global, "all": encoder.num_global, "cls": 1, "patch": 0}[tokens]
        self.num_patches = encoder.num_patches if tokens in ("patch", "all") else 0
        rows = self.num_global + min(self.num_patches, 1)
        self.register_buffer("mean", torch.zeros(rows, encoder.width, dtype=torch.float32))
        self.register_buffer("std", torch.ones(rows, encoder.width, dtype=torch.float32))
        self.register_buffer("projection", projection)

    @property
    def num_tokens(self) -> int:
        """S: tokens that an image gives."""
        return self.num_global + self.num_patches

    @property
    def dim(self) -> int:
        """D: width of a token, after the projection if there is one."""
        return self.mean.shape[1] if self.projection is None else self.projection.shape[0]

    def select(self, global_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the chosen ones of global tokens `(B, G, D)` and patch tokens `(B, P, D)`, as float32."""
        return global_tokens[:, : self.num_global].float(), patch_tokens[:, : self.num_patches].float()

    def forward(self, global_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
        """Tokens `(B, S, dim)`, global ones first, from an encoder's two outputs."""
        tokens = torch.cat(self.select(global_tokens, patch_tokens), dim=1)  # (B, S, D)
        tokens = (tokens - self._a_row_each(self.mean)) / self._a_row_each(self.std)
        return tokens if self.projection is None else F.linear(tokens, self.projection)

    def _a_row_each(self, statistics: Tensor) -> Tensor:
        """`(rows, D)` to `(S, D)`, where all patches share the last row."""
        if not self.num_patches:
            return statistics
        return torch.cat([statistics[:-1], statistics[-1:].expand(self.num_patches, -1)])


class Moments:
    """Running mean and variance of one encoder's tokens, in float64."""

    def __init__(self, head: TokenHead) -> None:
        self.has_patches = head.num_patches > 0
        self.count = torch.zeros(len(head.mean), 1, dtype=torch.float64)
        self.sum = torch.zeros(head.mean.shape, dtype=torch.float64)
        self.sum_of_squares = torch.zeros_like(self.sum)

    def update(self, global_tokens: Tensor, patch_tokens: Tensor) -> None:
        """Add global tokens `(B, G', D)` and patch tokens `(B, P', D)`."""
        slots = list(global_tokens.unbind(1))
        if self.has_patches:
            slots.append(patch_tokens.flatten(0, 1))
        for row, tokens in enumerate(slots):  # (B or B P', D)
            tokens = tokens.cpu().double()
            self.count[row] += len(tokens)
            self.sum[row] += tokens.sum(0)
            self.sum_of_squares[row] += tokens.square().sum(0)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """`(rows, D)` each; the standard deviation is bounded below and never 0."""
        mean = self.sum / self.count
        variance = ((self.sum_of_squares - self.count * mean.square()) / (self.count - 1)).clamp(min=0)
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise ValueError("The encoder's tokens are not finite: check its weights, or use float32 or bfloat16.")
        floor = _MIN_RELATIVE_STD * variance.mean(1, keepdim=True).sqrt()
        std = torch.maximum(variance.sqrt(), floor)
        return mean, std.where(std > 0, 1.0)


def semi_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random `(rows, columns)` matrix with orthonormal rows, or columns where there are fewer of them."""
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator, device="cpu", dtype=torch.float64)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()  # uniform over such matrices (Mezzadri 2007), and free of LAPACK's choice of signs
    return (q if rows >= columns else q.T).float().contiguous()
