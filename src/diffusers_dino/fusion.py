"""Several encoders under one denoiser: what tells their tokens apart, and what a missing encoder is replaced by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .conditioner import DinoImageConditioner
from .registration import ModelMixin

__all__ = ["TokenFusion", "check_dropout", "fuse"]


class TokenFusion(ModelMixin, ConfigMixin):
    """A learnable type embedding for each of several encoders, added to all of its tokens before the denoiser.

    It is trained with the denoiser and saved beside it. Tokens everywhere else (`image_embeds`, caches, the prior's)
    are those of the conditioner, without the embedding. The embeddings begin at zero: a new one changes nothing.

    Args:
        encoder_names: Names of the encoders, as `DinoImageConditioner.encoder_names` gives them.
        tokens_per_encoder: How many tokens each of them gives.
        token_dim: Width of the tokens.
        encoder_dropout: Probability in [0, 1) that an encoder was left out in training, in which case the null
            condition took the place of its tokens; above 0, any subset of the encoders works at sampling.

    Raises:
        ValueError: If there are fewer than two encoders, or the probability is out of range.
    """

    @register_to_config
    def __init__(
        self,
        *,
        encoder_names: Sequence[str],
        tokens_per_encoder: Sequence[int],
        token_dim: int,
        encoder_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(encoder_names) < 2 or len(encoder_names) != len(tokens_per_encoder):
            raise ValueError(
                f"Fusion is for two or more encoders with a number of tokens each, got {list(encoder_names)}."
            )
        check_dropout(encoder_dropout)
        self.type_embeddings = nn.Parameter(torch.zeros(len(encoder_names), token_dim))

    @classmethod
    def of(cls, conditioner: DinoImageConditioner, encoder_dropout: float = 0.0) -> TokenFusion:
        """A new one for the encoders of a conditioner."""
        return cls(
            encoder_names=conditioner.encoder_names,
            tokens_per_encoder=conditioner.tokens_per_encoder,
            token_dim=conditioner.token_dim,
            encoder_dropout=encoder_dropout,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Add its encoder's embedding to each of the tokens `(B, S, D)`; the sum is computed in float32."""
        pairs = zip(self.type_embeddings, self.config["tokens_per_encoder"], strict=True)
        types = torch.cat([embedding.expand(count, -1) for embedding, count in pairs])  # (S, D)
        return (tokens.float() + types.float()).to(tokens.dtype)

    def require_fit(self, conditioner: DinoImageConditioner | None, width: int) -> None:
        """Refuse with a ValueError a conditioner of other encoders, and a denoiser of another width."""
        config = self.config
        if config["token_dim"] != width:
            raise ValueError(f"The fusion is of tokens of width {config['token_dim']}, the denoiser takes {width}.")
        known = list(zip(config["encoder_names"], config["tokens_per_encoder"], strict=True))
        if conditioner is not None:
            given = list(zip(conditioner.encoder_names, conditioner.tokens_per_encoder, strict=True))
            if known != given:
                raise ValueError(
                    f"The fusion was trained for the encoders and numbers of tokens {known}, the conditioner has "
                    f"{given}. Load the conditioner that it was trained with."
                )


def fuse(fusion: TokenFusion | None, tokens: Tensor) -> Tensor:
    """Tokens as the denoiser takes them: the same without a fusion."""
    return tokens if fusion is None else fusion(tokens)


def check_dropout(encoder_dropout: float) -> None:
    """Refuse with a ValueError what is not a probability below 1."""
    if not 0 <= encoder_dropout < 1:
        raise ValueError(f"The dropout of encoders is a probability in [0, 1), got {encoder_dropout}.")
