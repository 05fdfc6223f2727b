"""Frozen vision transformers and what happens to their tokens, under the conditioner."""

from .loading import load_encoder
from .model import Encoder, EncoderSpec, ExactBuffers, describe_model
from .storage import LastingModelMixin
from .tokens import TOKENS, Moments, TokenHead, semi_orthogonal

__all__ = [
    "TOKENS",
    "Encoder",
    "EncoderSpec",
    "ExactBuffers",
    "LastingModelMixin",
    "Moments",
    "TokenHead",
    "describe_model",
    "load_encoder",
    "semi_orthogonal",
]
