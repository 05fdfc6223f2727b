"""Classifier-free guidance as functions of tensors."""

from __future__ import annotations

from torch import Tensor

__all__ = ["guide", "rescale_guidance"]


def guide(null: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `null + scale * (conditional - null)`.

    In the parametrisation of Imagen (Saharia et al., arXiv 2205.11487, eq. 2), as everywhere in diffusers: 1 is no
    guidance. Ho & Salimans (arXiv 2207.12598, eq. 6) count from 0, `scale = 1 + w`.

    Args:
        null: The model's prediction under the null condition, `(B, L, h, w)`.
        conditional: Its prediction under the condition, of the same shape.
        scale: 1 gives `conditional`, 0 gives `null`, more than 1 moves away from `null`.
    """
    return null + scale * (conditional - null)


def rescale_guidance(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """Bring a guided prediction back towards the standard deviation that the conditional one has.

    Guidance enlarges the prediction, which over-exposes images, most of all at zero terminal SNR (Lin et al.,
    arXiv 2305.08891, section 3.4, eqs. 15 and 16).

    Args:
        guided: `(B, L, h, w)`, from `guide`.
        conditional: The conditional prediction, of the same shape.
        rescale: phi in [0, 1]: 0 returns `guided` as it is, 1 matches the deviation of `conditional`, in each sample.
    """
    each_sample = tuple(range(1, guided.ndim))
    ratio = conditional.std(each_sample, keepdim=True) / guided.std(each_sample, keepdim=True)  # (B, 1, 1, 1)
    return rescale * (guided * ratio) + (1 - rescale) * guided
