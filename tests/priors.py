"""A tiny prior over the tokens of the tiny conditioner, which knows three labels, a number and a category."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import tiny
from diffusers_dino import DinoPrior, DinoPriorPipeline

LABELS = ("No Finding", "Edema", "Nodule")
SHAPE = (5, tiny.TOKEN_DIM)


def tiny_tokens(count: int = 64, seed: int = 0) -> torch.Tensor:
    """Tokens `(count, 5, 32)` with a mean and a covariance."""
    flat = tiny.gaussian(count, SHAPE[0] * SHAPE[1], seed=seed, dtype=torch.float32)
    mixing = tiny.gaussian(flat.shape[1], flat.shape[1], seed=99, dtype=torch.float32) / flat.shape[1] ** 0.5
    return (3 * flat @ mixing + 1).unflatten(1, SHAPE)


def tiny_prior(trained: bool = True, **overrides: Any) -> DinoPrior:
    """A prior with the statistics of `tiny_tokens`; `trained` gives its output layers random weights."""
    config = {
        "num_tokens": SHAPE[0],
        "token_dim": SHAPE[1],
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_components": 8,
        "labels": LABELS,
        "exclusive_labels": LABELS[:1],
        "numbers": {"age": [50.0, 20.0]},
        "categories": {"view": ["AP", "PA"]},
    }
    with tiny.seeded(7):
        prior = DinoPrior(**{**config, **overrides}).eval()
        if trained:
            for layer in (prior.predict, prior.final, prior.modulation[1]):
                torch.nn.init.normal_(layer.weight, std=0.2)
        for parameter in (prior.embed_condition.labels, prior.embed_condition.numbers):
            if parameter is not None:
                torch.nn.init.normal_(parameter)
    prior.fit_tokens(tiny_tokens())
    return prior


def tiny_prior_pipeline(**overrides: Any) -> DinoPriorPipeline:
    """The whole pipeline of `tiny_prior(**overrides)`."""
    return DinoPriorPipeline(tiny_prior(**overrides), FlowMatchEulerDiscreteScheduler())
