"""Frozen vision transformers and what happens to their tokens, under the conditioner."""

from .loading import load_encoder
from .model import Encoder, EncoderSpec, ExactBuffers
from .storage import LastingModelMixin

__all__ = ["Encoder", "EncoderSpec", "ExactBuffers", "LastingModelMixin", "load_encoder"]
