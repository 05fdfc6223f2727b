"""Frozen vision transformers and what happens to their tokens, under the conditioner."""

from .loading import load_encoder
from .model import Encoder, EncoderSpec, ExactBuffers, choose_encoders, describe_model, name_encoders
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
    "choose_encoders",
    "describe_model",
    "load_encoder",
    "name_encoders",
    "semi_orthogonal",
]
