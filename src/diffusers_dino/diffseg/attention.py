"""Self-attention maps of a UNet or a transformer, read while it runs and reduced at once.

Attention kernels return no maps. Every attention processor of diffusers, however, calls its layer's own query and key
projections, so the maps are computed anew from what these return: processors stay where they are and the output of the
model does not change by a bit, whether attention is SDPA, xformers, sliced or fused, and with LoRA inside.

In joint attention (Stable Diffusion 3's MMDiT) a layer's own projections are those of the image, and the condition has
others. Maps are of the image's queries over the image's keys: the softmax over these only, which is that part of the
joint one, with each head's row brought to sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..denoisers import unwrapped

__all__ = ["capture_features", "capture_self_attention", "self_attention_layers"]

# Scores of queries x keys x heads of one layer at a time, never all of them: 4 MiB, or on a GPU, where launching many
# small operations takes longer than the arithmetic, 256 MiB.
_CHUNK_NUMEL = 2**20
_CHUNK_NUMEL_ON_A_GPU = 2**26


@contextmanager
def capture_self_attention(
    model: nn.Module, sides: Collection[int] | None = None, layers: Collection[str] | None = None
) -> Iterator[dict[int, Tensor]]:
    """Collect the self-attention maps of the forward passes that run inside.

    Args:
        model: A `UNet2DConditionModel`, a `UNet2DModel`, an `SD3Transformer2DModel`, a `PixArtTransformer2DModel` or
            another of diffusers' image models built of its `Attention` layers; compiled ones run eagerly inside. Its
            input must be square. A ValueError if its attention cannot be read: linear, or with rotary positions.
        sides: Side lengths s of the layers to collect, those with s * s positions (of a transformer, patches); by
            default all. A ValueError, on leaving, if no layer of one of them has run.
        layers: Names of the layers to collect, or of their blocks; by default all.

    Yields:
        A dictionary, filled as the model runs: s to maps `(B, s * s, s * s)` float32, queries by keys, each row of sum
        1, the mean over all heads, layers and forward passes with s * s positions. For one image it is what
        `merging.aggregate_attention` takes.
    """
    chosen = _choose(self_attention_layers(model), layers, type(model).__name__)
    _require_readable(chosen, type(model).__name__)
    maps: dict[int, Tensor] = {}
    heads: dict[int, int] = {}  # by side: how many heads have run
    projected: dict[str, Tensor] = {}  # of the layer that runs

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: projected.update({name: output.detach()})

    @torch.no_grad()
    def reduce(layer: Attention, inputs: tuple, output: Tensor) -> None:
        query, key = _query_and_key(layer, projected)  # (B, h, N, d)
        projected.clear()
        batch, h, positions, _ = query.shape
        side = math.isqrt(positions)
        heads[side] = heads.get(side, 0) + h
        if sides is None or side in sides:
            if side not in maps:
                maps[side] = torch.zeros(batch, positions, positions, device=query.device)
            _update_mean(maps[side], query, key, layer.scale, h / heads[side])

    hooks = []
    for layer in chosen.values():
        hooks.append(layer.register_forward_pre_hook(lambda layer, inputs: projected.clear()))
        hooks.append(layer.register_forward_hook(reduce))
        for name in ("to_q", "to_k", "to_qkv"):
            if hasattr(layer, name):  # fused layers keep their separate projections and do not call them
                hooks.append(getattr(layer, name).register_forward_hook(keep(name)))
    with _hooked(model, hooks):
        yield maps
    if missing := sorted(set(sides or ()) - set(maps)):
        raise ValueError(
            f"The model has no self-attention of side {', '.join(map(str, missing))} for this input; it has "
            f"{sorted(heads) or 'run none'}. Ask for these, or give an image of another size."
        )


@contextmanager
def capture_features(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[list[Tensor]]:
    """Collect what self-attention layers give in the forward passes that run inside, as DiffCut does (2406.02842).

    Args:
        model: As in `capture_self_attention`; its input must be square. How its layers attend does not matter.
        layers: Names of the layers to collect, or of their blocks; by default only the last layer of a UNet's
            encoder, which DiffCut reads, and the middle layer of a transformer.

    Yields:
        A list, filled as the model runs: features `(B, D, s, s)` float32 of one layer after the other.
    """
    found = self_attention_layers(model)
    if layers is None and found:
        encoder = [name for name in found if name.startswith("down_blocks")]
        layers = [encoder[-1] if encoder else list(found)[len(found) // 2]]
    features: list[Tensor] = []

    def keep(layer: Attention, inputs: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output  # joint attention gives the condition's, too
        if output.ndim == 3:
            output = output.transpose(1, 2).unflatten(2, (math.isqrt(output.shape[1]), -1))
        features.append(output.detach().float())

    chosen = _choose(found, layers, type(model).__name__)
    with _hooked(model, [layer.register_forward_hook(keep) for layer in chosen.values()]):
        yield features


@contextmanager
def _hooked(model: nn.Module, hooks: list[RemovableHandle]) -> Iterator[None]:
    """Run a model on squares and eagerly, as compiled code would not call its hooks, and remove them afterwards."""
    hooks = [*hooks, model.register_forward_pre_hook(_check_square, with_kwargs=True)]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def self_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """The attention layers whose keys come from their own input, by name, in the order of the model's modules.

    Those of joint attention are among them: the keys of the condition come on top.
    """
    return {
        name: module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention and module.to_k is not None
    }


def _choose(found: dict[str, Attention], wanted: Collection[str] | None, model: str) -> dict[str, Attention]:
    """The layers of the wanted names, or inside the blocks of these names."""
    if not found:
        raise ValueError(f"{model} has no self-attention layers: it cannot be segmented by DiffSeg.")
    if wanted is None:
        return found
    if isinstance(wanted, str):
        raise TypeError(f"`layers` is a collection of names: give [{wanted!r}].")
    unknown = [name for name in wanted if not any(f"{layer}.".startswith(f"{name}.") for layer in found)]
    if unknown or not wanted:
        raise ValueError(f"{model} has no self-attention in {unknown or list(wanted)}; its layers are {list(found)}.")
    return {
        name: layer for name, layer in found.items() if any(f"{name}.".startswith(f"{block}.") for block in wanted)
    }


def _require_readable(layers: dict[str, Attention], model: str) -> None:
    """Refuse layers whose maps do not follow only from their projections and norms."""
    for name, layer in layers.items():
        kind, reason = type(layer.processor).__name__, None
        if any("rotary" in argument for argument in signature(layer.processor.__call__).parameters):
            reason = "turns queries and keys by rotary positions"
        elif "Linear" in kind:
            reason = "attends linearly, without maps"
        elif kind.startswith("FusedJoint") and layer.norm_q is not None:
            reason = "leaves out the norms that the model was trained with (call unfuse_qkv_projections)"
        if reason:
            raise ValueError(f"{model} cannot be segmented by DiffSeg: the {kind} of its layer {name} {reason}.")


def _query_and_key(layer: Attention, projected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys of one call of a layer, each `(B, h, N, d)` float32."""
    if "to_qkv" in projected:
        query, key, _ = projected["to_qkv"].chunk(3, dim=-1)
    elif "to_q" in projected and "to_k" in projected:
        query, key = projected["to_q"], projected["to_k"]
    else:
        raise ValueError(
            f"The attention processor {type(layer.processor).__name__} does not call the layer's projections, so its "
            "maps cannot be read. Set one of diffusers' processors, as set_default_attn_processor() of a UNet does."
        )
    width = query.shape[-1] // layer.heads
    query, key = (x.unflatten(-1, (-1, width)).transpose(1, 2).float() for x in (query, key))
    if layer.norm_q is not None:  # which give half precision where their weights are
        query = layer.norm_q(query).float()
    if layer.norm_k is not None:
        key = layer.norm_k(key).float()
    return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped-query attention shares keys


def _update_mean(mean: Tensor, query: Tensor, key: Tensor, scale: float, weight: float) -> None:
    """Move a running mean of maps `(B, N, N)` in place towards those of one layer: `mean += weight * (new - mean)`.

    Query and key are `(B, h, N, d)` float32; `scale` multiplies the scores before the softmax.
    """
    batch, heads, positions, _ = query.shape
    at_once = _CHUNK_NUMEL_ON_A_GPU if query.is_cuda else _CHUNK_NUMEL
    rows = max(1, at_once // (batch * heads * positions))
    query, key = query * scale, key.transpose(-1, -2)
    for start in range(0, positions, rows):
        chunk = slice(start, start + rows)
        scores = query[:, :, chunk] @ key  # (B, h, rows, N)
        maps = torch.softmax(scores, dim=-1, out=scores)  # in their place: they are held once
        mean[:, chunk].lerp_(maps.mean(dim=1), weight)


def _check_square(module: nn.Module, args: tuple, kwargs: dict) -> None:
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if isinstance(sample, Tensor) and sample.shape[-1] != sample.shape[-2]:
        raise ValueError(
            f"Self-attention maps are read as squares, but the model was given latents of shape "
            f"{tuple(sample.shape)}. Resize the image to a square and the masks back to its size, as DiffSegPipeline "
            "does."
        )
