"""The prior: a small transformer that denoises an image's condition tokens, given what is known of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..embeddings import token_statistics
from ..encoders import ExactBuffers
from ..registration import ModelMixin
from .conditions import Condition, PriorConditions
from .flow import gaussian_velocity, noise_level

__all__ = ["DinoPrior"]

_FREQUENCIES = 128
_MIN_TOKENS = 16


class DinoPrior(ExactBuffers, ModelMixin, ConfigMixin):
    """Predicts the velocity of flow matching on standardised condition tokens `(B, S, D)`.

    The idea is RCG's (Li et al., arXiv 2312.03701): with a diffusion model of a self-supervised encoder's
    representations, a generator that is conditioned on them needs no image. Here the S tokens are a sequence with one
    register for the condition, which also scales and shifts every layer (adaLN-single, PixArt-alpha); for S = 1 that
    is RCG's residual MLP in effect.

    The network corrects the velocity that would be right if the tokens were normally distributed (`fit_tokens`): an
    untrained prior samples a Gaussian of the tokens' mean and covariance. Weights may be of any type; the statistics
    of tokens stay float32.

    Args:
        num_tokens: S.
        token_dim: D.
        width: Of the transformer.
        num_layers: Blocks.
        num_heads: Attention heads; `width` is a multiple of them.
        mlp_ratio: Width of the blocks' MLPs, in units of `width`.
        num_components: Directions in which the Gaussian knows the tokens' variance; at most `S * D`.
        labels: Vocabulary of labels.
        exclusive_labels: Those of them that come without any other, such as "No Finding".
        numbers: Mean and standard deviation of the numbers of the metadata, by name.
        categories: Values of the categories of the metadata, by name.
        text_dim: Width of the text encoder's tokens; None for a prior without text.
        text_encoder: Name and `text_revision` of the text encoder, for the record.
        text_revision: See `text_encoder`.
        text_length: Tokens that a text is cut to.
        conditioner: What `describe_conditioner` says of the conditioner that the tokens are of.

    Raises:
        ValueError: If a number is not positive, `width` is not a multiple of the heads, or names repeat.
    """

    exact_buffers = ("token_mean", "token_std", "components", "variances", "rest")
    _keep_in_fp32_modules = ["token_mean", "token_std", "components", "variances", "rest"]  # noqa: RUF012
    _supports_gradient_checkpointing = False
    _no_split_modules = ["_Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_components: int = 128,
        labels: Sequence[str] = (),
        exclusive_labels: Sequence[str] = (),
        numbers: Mapping[str, Sequence[float]] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        text_dim: int | None = None,
        text_encoder: str | None = None,
        text_revision: str | None = None,
        text_length: int = 77,
        conditioner: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_tokens": num_tokens, "token_dim": token_dim, "width": width, "num_layers": num_layers}
        for name, value in {**sizes, "num_heads": num_heads, "text_length": text_length}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if width % num_heads or width % 2:
            raise ValueError(f"`width` must be even and a multiple of the {num_heads} heads, got {width}.")
        if not 0 <= num_components <= num_tokens * token_dim:
            raise ValueError(f"`num_components` must be in 0..{num_tokens * token_dim}, got {num_components}.")
        self.conditions = PriorConditions(
            tuple(labels), tuple(exclusive_labels), dict(numbers or {}), dict(categories or {}), text_dim
        )
        self.embed_time = nn.Sequential(Timesteps(_FREQUENCIES, True, 0), TimestepEmbedding(_FREQUENCIES, width))
        self.embed_condition = _ConditionEmbedding(self.conditions, width)
        self.embed_tokens = nn.Linear(token_dim, width)
        self.slots = nn.Parameter(torch.randn(num_tokens + 1, width) * 0.02)  # the last one is the register
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.embed_text = None if text_dim is None else nn.Linear(text_dim, width)
        self.blocks = nn.ModuleList(
            _Block(width, num_heads, mlp_ratio, with_text=text_dim is not None) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final = nn.Linear(width, 2 * width)
        self.predict = nn.Linear(width, token_dim)
        for layer in (self.modulation[1], self.final, self.predict):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("token_mean", torch.zeros(num_tokens, token_dim, dtype=torch.float32))
        self.register_buffer("token_std", torch.ones(num_tokens, token_dim, dtype=torch.float32))
        self.register_buffer("components", torch.zeros(num_components, num_tokens * token_dim, dtype=torch.float32))
        self.register_buffer("variances", torch.ones(num_components, dtype=torch.float32))
        self.register_buffer("rest", torch.ones((), dtype=torch.float32))

    @property
    def token_shape(self) -> tuple[int, int]:
        """`(S, D)` of an image's tokens."""
        return self.config["num_tokens"], self.config["token_dim"]

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        """Predict the velocity.

        Args:
            hidden_states: Noisy standardised tokens `(B, S, D)`.
            timestep: `(B,)`, noise level times 1,000, in (0, 1000], as of diffusers' flow matching schedulers.
            condition: Of the B images; None if nothing is known.

        Returns:
            `(B, S, D)` float32: noise less clean tokens, as far as they can be told.
        """
        noisy, times = hidden_states.float(), timestep.float() / 1000
        if condition is None:
            condition = self.conditions.unknown(len(noisy)).to(noisy.device)
        dtype = self.slots.dtype
        embedded = self.embed_time[0](timestep.float()).to(dtype)
        given = self.embed_time[1](embedded) + self.embed_condition(condition, dtype)  # (B, W)
        modulation = self.modulation(given).unflatten(1, (6, 1, -1))  # (B, 6, 1, W)
        spread = ((1 - times).square() + times.square()).sqrt()[:, None, None]  # of a noisy token of unit variance
        tokens = self.embed_tokens((noisy / spread).to(dtype))
        sequence = torch.cat([tokens, given[:, None]], dim=1) + self.slots  # (B, S + 1, W)
        text, mask = None, None
        if self.embed_text is not None:
            text = self.embed_text(condition.text.to(dtype))
            mask = condition.text_mask
        for block in self.blocks:
            sequence = block(sequence, modulation, text, mask)
        scale, shift = self.final(F.silu(given))[:, None].chunk(2, dim=-1)
        correction = self.predict(self.norm(sequence[:, :-1]) * (1 + scale) + shift).float()
        with torch.autocast(noisy.device.type, enabled=False):
            known = gaussian_velocity(noisy.flatten(1), times, self.components, self.variances, self.rest)
        return known.view_as(noisy) + correction / spread

    @apply_forward_hook  # brings the statistics to the device where they are offloaded
    def standardise(self, tokens: Tensor) -> Tensor:
        """The `tokens` `(B, S, D)` of a conditioner as the prior sees them, float32."""
        return (tokens.float() - self.token_mean.to(tokens.device)) / self.token_std.to(tokens.device)

    @apply_forward_hook
    def restore(self, tokens: Tensor) -> Tensor:
        """The inverse of `standardise`, for `tokens` `(B, S, D)`."""
        return tokens * self.token_std.to(tokens.device) + self.token_mean.to(tokens.device)

    @apply_forward_hook
    def noise_level(self, strength: float) -> float:
        """The time in [0, 1] to noise tokens to, for a `strength` in [0, 1] of `DinoPriorPipeline.renoise`."""
        others = self.config["num_tokens"] * self.config["token_dim"] - len(self.variances)
        return noise_level(strength, torch.cat([self.variances, self.rest.expand(others)]).cpu())

    @torch.no_grad()
    def fit_tokens(self, tokens: Tensor) -> None:
        """Take mean, deviation and principal directions from the `tokens` `(N, S, D)` of training; they are saved.

        Raises:
            ValueError: If there are fewer than 16, of another shape, or one is not finite.
        """
        if tuple(tokens.shape[1:]) != self.token_shape or tokens.ndim != 3:
            raise ValueError(
                f"Expected tokens (N, {', '.join(map(str, self.token_shape))}), got {tuple(tokens.shape)}."
            )
        if len(tokens) < _MIN_TOKENS:
            raise ValueError(f"A prior needs the tokens of at least {_MIN_TOKENS} images, got {len(tokens)}.")
        if not torch.isfinite(tokens).all():
            bad = int((~torch.isfinite(tokens).flatten(1).all(1)).sum())
            raise ValueError(
                f"The tokens of {bad} of {len(tokens)} images are NaN or infinite: encode them in float32."
            )
        mean, std = token_statistics(tokens)
        self.token_mean.copy_(mean)
        self.token_std.copy_(std)
        rows = ((tokens.double() - mean) / std).flatten(1)  # (N, S D)
        covariance = rows.T @ rows / (len(rows) - 1)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        kept = self.config["num_components"]
        self.components.copy_(vectors[:, :kept].T)
        self.variances.copy_(values[:kept].clamp(min=1e-6))
        left = values[kept:]
        self.rest.fill_(max(left.mean().item(), 1e-6) if len(left) else 1.0)


class _ConditionEmbedding(nn.Module):
    """Labels, numbers and categories as one vector `(B, W)`; what is unknown adds nothing or a vector of its own."""

    def __init__(self, conditions: PriorConditions, width: int) -> None:
        super().__init__()
        count, numbers = len(conditions.labels), len(conditions.numbers)
        self.labels = nn.Parameter(torch.randn(2 * count, width) * 0.02) if count else None  # present, then absent
        self.numbers = nn.Parameter(torch.randn(3 * numbers, width) * 0.02) if numbers else None
        self.categories = nn.ModuleList(nn.Embedding(len(v) + 1, width) for v in conditions.categories.values())
        self.mix = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, condition: Condition, dtype: torch.dtype) -> Tensor:
        """`(B, W)` in `dtype`."""
        size = len(condition.labels), self.mix[0].in_features
        embedded = torch.zeros(size, dtype=dtype, device=condition.labels.device)
        if self.labels is not None:
            labels = condition.labels.to(dtype)
            embedded = embedded + torch.cat([labels.clamp(min=0), (-labels).clamp(min=0)], dim=1) @ self.labels
        if self.numbers is not None:
            values = condition.numbers.nan_to_num(0).clamp(-6, 6)
            facts = torch.cat([condition.numbers.isfinite().float(), values, values.square()], dim=1)
            embedded = embedded + facts.to(dtype) @ self.numbers
        for table, column in zip(self.categories, condition.categories.unbind(1), strict=True):
            embedded = embedded + table(column)
        return self.mix(embedded)


class _Block(nn.Module):
    """Self-attention over the tokens and the register, cross-attention to a text if there may be one, and an MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, with_text: bool) -> None:
        super().__init__()
        self.heads = num_heads
        self.own = nn.Parameter(torch.randn(6, 1, width) * 0.02)  # added to the modulation that all blocks share
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        if with_text:
            self.text_norm = nn.LayerNorm(width)
            self.text_q = nn.Linear(width, width)
            self.text_kv = nn.Linear(width, 2 * width)
            self.text_out = nn.Linear(width, width)
            self.no_text = nn.Parameter(torch.randn(1, 1, width) * 0.02)  # attention needs something to look at

    def forward(self, sequence: Tensor, modulation: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.own).unbind(1)  # (B, 1, W) each
        queries = self.norm(sequence) * (1 + scale_a) + shift_a
        attended = self._attend(*self.qkv(queries).chunk(3, dim=-1))
        sequence = sequence + gate_a * self.out(attended)
        if text is not None:
            text = torch.cat([self.no_text.expand(len(text), -1, -1), text], dim=1)
            seen = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)[:, None, None]  # (B, 1, 1, T + 1)
            keys, values = self.text_kv(text).chunk(2, dim=-1)
            sequence = sequence + self.text_out(
                self._attend(self.text_q(self.text_norm(sequence)), keys, values, seen)
            )
        return sequence + gate_m * self.mlp(self.norm(sequence) * (1 + scale_m) + shift_m)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (queries, keys, values))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)
