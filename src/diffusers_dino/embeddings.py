"""Arithmetic on condition tokens: paths between images, blends of several, splices of their patches.

Tokens are `(..., S, D)`, class token first, as `DinoImageConditioner` gives them; every function treats each of the S
tokens on its own and works for any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lerp", "mix", "slerp", "splice_patch_tokens", "token_statistics"]

_MIN_STD = 1e-3  # relative to a token's root mean square deviation
_PARALLEL = 1e-4  # sine of the angle below which a great circle is not defined well enough to follow


def lerp(source: Tensor, target: Tensor, fraction: float | Tensor, restore_norm: bool = False) -> Tensor:
    """Linear interpolation, DiNO-Diffusion section 2.3: `(1 - r) f(x1) + r f(x2)`.

    Args:
        source: `(..., S, D)`, returned bit for bit at fraction 0.
        target: The same shape, returned bit for bit at fraction 1.
        fraction: In [0, 1]: one number, or a tensor of the leading dimensions; a ValueError if it is outside.
        restore_norm: Whether to give each token the interpolated norm of its two ends, which the chord between them
            falls short of: halfway between orthogonal tokens by a factor of 0.71.

    Returns:
        `(..., S, D)`.
    """
    weight = _weight(source, target, fraction)
    mixed = torch.lerp(source, target, weight)
    if not restore_norm:
        return mixed
    return _at_ends(source, target, weight, mixed * (_lerp_norm(source, target, weight) / _norm(mixed)))


def slerp(source: Tensor, target: Tensor, fraction: float | Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985): the great circle between directions, norms interpolated linearly.

    Tokens that are parallel, opposite or zero have no single great circle and are interpolated linearly. Arguments,
    result and errors are as in `lerp`.
    """
    weight = _weight(source, target, fraction)
    from_unit, to_unit = source / _norm(source), target / _norm(target)
    # atan2 keeps its precision near 0 and pi, where arccos loses half of the digits
    angle = 2 * torch.atan2(_norm(from_unit - to_unit), _norm(from_unit + to_unit))  # (..., S, 1)
    sine = angle.sin()
    direction = (((1 - weight) * angle).sin() * from_unit + (weight * angle).sin() * to_unit) / sine
    on_circle = direction * _lerp_norm(source, target, weight)
    turns = (sine > _PARALLEL) & (source != 0).any(-1, keepdim=True) & (target != 0).any(-1, keepdim=True)
    mixed = torch.where(turns, on_circle, torch.lerp(source, target, weight))
    return _at_ends(source, target, weight, mixed)


def mix(tokens: Tensor, weights: Tensor, restore_norm: bool = False) -> Tensor:
    """Blend the tokens of K images.

    Args:
        tokens: `(K, ..., S, D)`.
        weights: `(K,)`, none negative, sum 1; a ValueError if they are not.
        restore_norm: Whether to give each token the weighted mean of the norms of its K parts.

    Returns:
        `(..., S, D)`.
    """
    weights = torch.as_tensor(weights, dtype=tokens.dtype, device=tokens.device)
    if weights.shape != tokens.shape[:1]:
        raise ValueError(
            f"Expected one weight for each of the {len(tokens)} images, got shape {tuple(weights.shape)}."
        )
    if (weights < 0).any() or abs(weights.sum().item() - 1) > 1e-3 or not torch.isfinite(weights).all():
        raise ValueError(
            f"Weights must not be negative and must sum to 1, got {[round(w, 4) for w in weights.tolist()]}."
        )
    mixed = torch.tensordot(weights, tokens, dims=1)
    if restore_norm:
        mixed = mixed * (torch.tensordot(weights, _norm(tokens), dims=1) / _norm(mixed))
    return mixed


def splice_patch_tokens(source: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Put the patches of another image into an image's tokens (DiNO-Diffusion, appendix A.1, Figs 6 and 7).

    Args:
        source: `(..., S, D)` of a conditioner with `tokens="all"` or `"patch"`: global tokens first, then patches.
        other: The same shape.
        mask: `(h, w)` bool on the grid of patches; true where `other`'s patches go.

    Returns:
        `(..., S, D)` with `source`'s global tokens.
    """
    _check_pair(source, other)
    if mask.dtype != torch.bool:
        raise TypeError(f"The mask must be bool, got {mask.dtype}.")
    num_global = source.shape[-2] - mask.numel()
    if mask.ndim != 2 or num_global < 0:
        raise ValueError(f"The mask must be (h, w) with at most {source.shape[-2]} patches, got {tuple(mask.shape)}.")
    chosen = torch.cat([mask.new_zeros(num_global), mask.flatten()]).to(source.device)  # (S,)
    return torch.where(chosen[:, None], other, source)


def _weight(source: Tensor, target: Tensor, fraction: float | Tensor) -> Tensor:
    """The fraction, checked, as a tensor that broadcasts against `(..., S, D)`."""
    _check_pair(source, target)
    weight = torch.as_tensor(fraction, dtype=source.dtype, device=source.device)
    if not ((weight >= 0) & (weight <= 1)).all():
        raise ValueError(f"Fractions must be in [0, 1], got {fraction}.")
    if weight.ndim and weight.shape != source.shape[: weight.ndim]:
        raise ValueError(f"Fractions of shape {tuple(weight.shape)} do not fit tokens of shape {tuple(source.shape)}.")
    return weight.reshape(*weight.shape, *[1] * (source.ndim - weight.ndim))


def _check_pair(source: Tensor, other: Tensor) -> None:
    if source.shape != other.shape or source.ndim < 2:
        raise ValueError(
            f"Expected tokens (..., S, D) of one shape, got {tuple(source.shape)} and {tuple(other.shape)}."
        )


def _norm(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny)


def _lerp_norm(source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(_norm(source), _norm(target), weight)


def _at_ends(source: Tensor, target: Tensor, weight: Tensor, mixed: Tensor) -> Tensor:
    """The ends themselves where the fraction is 0 or 1, whatever rounding did to `mixed` there."""
    return torch.where(weight == 0, source, torch.where(weight == 1, target, mixed))


def token_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each `(S, D)` float64, of the tokens `(N, S, D)` of N >= 2 images.

    Where tokens hardly differ, the deviation is a thousandth of that of their slot, so that it can be divided by.
    """
    tokens = tokens.double()
    std = tokens.std(0)
    std = torch.maximum(std, _MIN_STD * std.square().mean(1, keepdim=True).sqrt())
    return tokens.mean(0), std.where(std > 0, 1.0)
