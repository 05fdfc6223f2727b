"""Arithmetic of flow matching on standardised tokens, and the random draws that it is trained with.

A noisy token is `x_t = (1 - t) x + t e` with t from 0 (the token) to 1 (noise), and the model predicts the velocity
`e - x` (Lipman et al. 2023; rectified flow, Liu et al. 2023): diffusers' FlowMatchEulerDiscreteScheduler, `t = sigma`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..devices import send
from ..seeds import generator_for

__all__ = ["FlowDraws", "Times", "add_noise", "draw_for_prior", "gaussian_velocity", "noise_level"]

Times = Literal["logit-normal", "uniform"]


class FlowDraws(NamedTuple):
    """All that is random in one batch of training.

    Attributes:
        noise: `(B, S, D)`.
        times: `(B,)` in (0, 1).
        drop: `(B,)` uniform on [0, 1): the whole condition is dropped where it is below the probability.
        drop_labels: `(B, L)`, likewise for single labels; `drop_share` scales it.
        drop_share: `(B,)`, which share of the labels an image loses, so that both all and few of them are seen.
    """

    noise: Tensor
    times: Tensor
    drop: Tensor
    drop_labels: Tensor
    drop_share: Tensor

    def to(self, device: torch.device | str) -> FlowDraws:
        """The same draws on a device, which the host does not wait for."""
        return FlowDraws(*(send(part, device) for part in self))


def draw_for_prior(
    positions: Sequence[int],
    shape: tuple[int, int],
    num_labels: int = 0,
    seed: int = 0,
    times: Times = "logit-normal",
    purpose: str = "prior",
) -> FlowDraws:
    """Draw for a batch, on the CPU; each sample's draws depend only on (seed, purpose, its position).

    Args:
        positions: The B places in the global order of a run.
        shape: `(S, D)`.
        num_labels: L.
        seed: Of the run.
        times: `"logit-normal"`, which prefers the middle (Esser et al. 2024), or `"uniform"`.
        purpose: What the draws are for.
    """
    if times not in ("logit-normal", "uniform"):
        raise ValueError(f"Times are drawn 'logit-normal' or 'uniform', not {times!r}.")
    rows = []
    for position in positions:
        generator = generator_for(seed, purpose, position)
        uniform = torch.rand(3 + num_labels, generator=generator)
        normal = torch.randn((), generator=generator)
        time = normal.sigmoid() if times == "logit-normal" else uniform[0].clamp(1e-4, 1 - 1e-4)
        noise = torch.randn(shape, generator=generator)
        rows.append((noise, time, uniform[1], uniform[3:], uniform[2]))
    return FlowDraws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def add_noise(tokens: Tensor, noise: Tensor, times: Tensor | float) -> Tensor:
    """`(1 - t) x + t e` of tokens `(B, S, D)` and times `(B,)`, or one time for all."""
    times = torch.as_tensor(times, dtype=tokens.dtype, device=tokens.device).reshape(-1, 1, 1)
    return (1 - times) * tokens + times * noise


def gaussian_velocity(noisy: Tensor, times: Tensor, components: Tensor, variances: Tensor, rest: Tensor) -> Tensor:
    r"""The best prediction if the tokens were normally distributed with mean 0, a probabilistic PCA of them.

    In a direction of variance :math:`\lambda` it is
    :math:`(t - (1 - t) \lambda) / ((1 - t)^2 \lambda + t^2) \cdot x_t`.

    Args:
        noisy: `(B, N)`, tokens as one vector.
        times: `(B,)`, not 0 where a variance is 0.
        components: `(K, N)`, orthonormal directions.
        variances: `(K,)`, of them.
        rest: `()`, the variance in every other direction.
    """
    times = times[:, None]

    def slope(variance: Tensor) -> Tensor:
        return (times - (1 - times) * variance) / ((1 - times).square() * variance + times.square())

    inside = noisy @ components.T  # (B, K)
    return slope(rest) * noisy + ((slope(variances) - slope(rest)) * inside) @ components


def noise_level(strength: float, variances: Tensor) -> float:
    r"""The time to noise tokens to, so that denoising moves them a share `strength` of the way to unrelated tokens.

    Where tokens are normally distributed, with a variance :math:`\lambda` in each direction, noising to the time t and
    following the flow back keeps a correlation
    :math:`\rho = (1 - t) \sqrt\lambda / \sqrt{(1 - t)^2 \lambda + t^2}` with the given token. The root mean square
    distance to it, in units of that between two independent tokens, is
    :math:`\sqrt{\sum \lambda (1 - \rho) / \sum \lambda}` and grows with t from 0 to 1. This is its inverse.

    Args:
        strength: In [0, 1].
        variances: `(N,)`, of all directions.

    Returns:
        t in [0, 1]; exactly 0 and 1 at the ends.
    """
    if strength in (0, 1):
        return float(strength)
    variances = variances.double()
    low, high = 0.0, 1.0
    for _ in range(60):
        time = (low + high) / 2
        kept = (1 - time) * variances.sqrt() / ((1 - time) ** 2 * variances + time**2).sqrt()
        moved = ((variances * (1 - kept)).sum() / variances.sum()).sqrt().item()
        low, high = (time, high) if moved < strength else (low, time)
    return high
