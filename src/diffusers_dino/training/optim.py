"""AdamW in the forms that trainings here use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..extras import require

__all__ = ["decay_matrices", "make_adamw"]


def make_adamw(
    parameters: list[nn.Parameter],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    eight_bit: bool = False,
) -> torch.optim.Optimizer:
    """PyTorch's AdamW, fused where it can be, or bitsandbytes' (if installed), which keeps the moments in 8 bits."""
    if eight_bit:
        bitsandbytes = require("bitsandbytes", "train", "8-bit AdamW needs bitsandbytes")
        return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=fused)


def decay_matrices(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer: matrices and kernels decay, biases and scales do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
