"""bitsandbytes' 8-bit and 4-bit layers in place of the linear ones of a model in memory, with or without a GPU.

diffusers quantises while it loads (`from_pretrained(..., quantization_config=...)`, which works for every model and
pipeline here), and refuses to without a GPU. This does the same, through diffusers' own quantizers, to a model that is
there already: on a machine without a GPU, after a LoRA was fused, to a conditioner just made from an encoder.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from diffusers import BitsAndBytesConfig, ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn

from .extras import require

__all__ = ["quantize"]

_BLOCK = 64  # weights that share a scale in 4 bits


def quantize(
    model: ModelMixin, quantization_config: BitsAndBytesConfig, device: torch.device | str | None = None
) -> ModelMixin:
    """Replace the linear layers of a model by bitsandbytes' 8-bit or 4-bit ones, in place.

    Convolutions, norms and embeddings keep their type, and so do the few linear layers that bitsandbytes cannot
    replace: `qkv` of timm's BEiT and EVA-02, which use its weight without calling it; and in 4 bits on a CPU, layers
    whose number of inputs is not a multiple of 64.

    Args:
        model: A UNet, a `DinoImageConditioner` or another model of diffusers; changed. Load adapters afterwards.
        quantization_config: diffusers' `BitsAndBytesConfig(load_in_4bit=True)` or `(load_in_8bit=True)` with its
            other options, of which `llm_int8_skip_modules` names further layers to leave as they are.
        device: Where the model is to be; by default where it is.

    Returns:
        The same model.

    Raises:
        ValueError: If the model is quantised already, or has adapters.
    """
    require("bitsandbytes", "train", "Quantisation needs bitsandbytes")
    _check(model, quantization_config)
    device = model.device if device is None else torch.device(device)
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = deepcopy(quantization_config)  # diffusers' quantizer adds to its list of exceptions
    # timm's BEiT and EVA-02 hand this weight to `F.linear` themselves, with their own biases
    unfit = {f"{path}.qkv" for path, part in model.named_modules() if getattr(part, "q_bias", None) is not None}
    if config.load_in_4bit and device.type == "cpu":
        # bitsandbytes 0.49 and 0.50 take the scales of such layers from the wrong blocks there
        unfit |= {path for path, layer in linear.items() if layer.in_features % _BLOCK}
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or []), *sorted(unfit)]
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=model._keep_in_fp32_modules or [])
    for path, old in linear.items():
        new = model.get_submodule(path)
        if new is old:
            continue
        quantizer.create_quantized_param(model, old.weight.data, f"{path}.weight", device, {})
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        new.train(old.training)
        # On CPUs with AVX512-BF16 these releases also pack 4-bit weights anew in the first call, and cannot restore
        # their scales when the state dict is read: to save the model, or to load a LoRA into it.
        new.support_avx512bf16_for_cpu = False
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.register_to_config(quantization_config=config)
    return model.to(device)


def _check(model: ModelMixin, config: BitsAndBytesConfig) -> None:
    name = type(model).__name__
    if not isinstance(model, ModelMixin):
        raise TypeError(f"`model` must be a model of diffusers, such as a pipeline's unet or conditioner, got {name}.")
    if not isinstance(config, BitsAndBytesConfig):
        raise TypeError(f"`quantization_config` must be a diffusers.BitsAndBytesConfig, got {type(config).__name__}.")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"This {name} is quantised already: load it anew to quantise it in another way.")
    if getattr(model, "peft_config", None):
        raise ValueError(f"This {name} has adapters: unload them, quantise it, and load them again.")
