"""Text-conditioned pipelines of diffusers at tiny size, on the components of `tiny.py`."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

import tiny


def tokenizer() -> CLIPTokenizer:
    """Of three words and seven tokens."""
    return CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[], model_max_length=7)


def text_encoder(kind: type[PreTrainedModel] = CLIPTextModel) -> PreTrainedModel:
    """As wide as `tiny_unet` takes; half as wide with a projection, as of Stable Diffusion XL there are two."""
    config = CLIPTextConfig(
        vocab_size=3,
        hidden_size=tiny.TOKEN_DIM // (1 if kind is CLIPTextModel else 2),
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with tiny.seeded(4):
        return kind(config).eval()


def stable_diffusion(**components: Any) -> StableDiffusionPipeline:
    """A whole pipeline; components given by name replace the tiny ones."""
    parts = {
        "vae": tiny.tiny_vae(3),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": tiny.tiny_unet(),
        "scheduler": tiny.tiny_scheduler(),
    }
    return StableDiffusionPipeline(
        **{**parts, **components}, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    unet = tiny.tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        transformer_layers_per_block=(1, 2),
    )
    encoder = CLIPTextModelWithProjection
    return StableDiffusionXLPipeline(
        vae=tiny.tiny_vae(3),
        text_encoder=text_encoder(encoder),
        text_encoder_2=text_encoder(encoder),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=tiny.tiny_scheduler(),
    )
