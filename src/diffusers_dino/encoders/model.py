"""Frozen vision transformers of transformers and timm behind one call: images in, global and patch tokens out.

A saved encoder is its `EncoderSpec` (JSON) and its weights (safetensors); neither needs the network, nor the
checkpoint it came from.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = [
    "RESAMPLINGS",
    "SUPPORTED",
    "TRANSFORMERS_FAMILIES",
    "Encoder",
    "EncoderSpec",
    "ExactBuffers",
    "check_size",
    "choose_encoders",
    "describe_model",
    "is_timm_family",
    "name_encoders",
]

TRANSFORMERS_FAMILIES: dict[str, tuple[type, type]] = {
    "vit": (transformers.ViTConfig, transformers.ViTModel),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
    "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel),
}
TIMM_FAMILIES = ("vision_transformer", "eva", "deit", "beit")  # modules of timm.models: plain ViTs with prefix tokens
RESAMPLINGS = ("nearest", "bilinear", "bicubic")
SUPPORTED = (
    "DINOv1 and other plain ViTs (model_type vit), DINOv2 and RAD-DINO (dinov2), DINOv2 with registers "
    "(dinov2_with_registers), DINOv3 ViT (dinov3_vit), and the ViTs of timm (timm.models."
    + ", ".join(TIMM_FAMILIES)
    + ")"
)
# Arguments that would make the builders read files or code that a config must not name.
_FORBIDDEN = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "auto_map"),
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
}
# Of a transformers config, what describes a training head or a run and not the network.
_NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "return_dict"),
    *("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states"),
    *("out_features", "out_indices", "stage_names"),
}


@dataclass(frozen=True)
class EncoderSpec:
    """All that is needed to build an encoder again, weights apart.

    Attributes:
        backend: `"transformers"` or `"timm"`.
        architecture: transformers' `model_type`, or timm's model name.
        arguments: transformers' config, or timm's arguments of `create_model`.
        pooler: Whether the checkpoint holds trained pooler weights (transformers' `ViTModel` only).
        size: Side in pixels of the square images that the encoder sees; a multiple of its patch.
        resample: How images are brought to `size`: `"nearest"`, `"bilinear"` or `"bicubic"`, with antialiasing.
        mean: Red, green and blue, in units of [0, 1], subtracted before the network.
        std: Likewise, by which the difference is divided.
        source: Where the weights came from: a Hub id or a folder's name.
        revision: The commit on the Hub, where there is one.
    """

    backend: str
    architecture: str
    arguments: dict[str, Any]
    pooler: bool
    size: int
    resample: str
    mean: Sequence[float]
    std: Sequence[float]
    source: str
    revision: str | None

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLINGS:
            raise ValueError(f"`resample` must be one of {', '.join(RESAMPLINGS)}, got {self.resample!r}.")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"`size` must be a positive number of pixels, got {self.size!r}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, (int, float)) and abs(v) < float("inf") for v in values):
                raise ValueError(f"`{name}` must be three finite numbers (red, green, blue), got {values!r}.")
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be positive, got {self.std!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """Read what `to_dict` wrote; a ValueError if a key is missing or unknown."""
        known = {field.name for field in fields(cls)}
        if wrong := known ^ set(values):
            raise ValueError(
                f"An encoder's config must have the keys {', '.join(sorted(known))}; missing or unknown: "
                f"{', '.join(sorted(wrong))}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


class ExactBuffers(nn.Module):
    """A module whose buffers named in `exact_buffers` stay float32 when it is cast.

    Half precision would round token statistics (some channels have a mean of many standard deviations) and the
    frequencies of rotary positions, and would save nothing.
    """

    exact_buffers: tuple[str, ...] = ()  # parts of their names

    def is_exact(self, name: str) -> bool:
        """Whether the buffer of this `name` stays in float32 when the module is cast."""
        return any(part in name for part in self.exact_buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        exact = {name: buffer for name, buffer in self.named_buffers() if self.is_exact(name)}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(path)
            if getattr(owner, leaf).dtype != buffer.dtype:
                setattr(owner, leaf, buffer.to(getattr(owner, leaf).device))
        return self


class Encoder(ExactBuffers):
    """A vision transformer with its own normalisation of pixels; the weights are random until a state dict is loaded.

    Attributes:
        model: transformers' or timm's module.
        width: Width of its tokens.
        patch: Side of its patches in pixels.
        num_global: Number of its global tokens: class token, trained pooler, registers.
        num_patches: Number of its patch tokens.
        has_class_token: False for the timm models that pool their patches.
    """

    exact_buffers = ("pixel_mean", "pixel_std", "rope")

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = self._build(spec)
        self.width, self.patch, self.num_prefix, self.has_class_token = _shape(self.model)
        self.num_global = self.num_prefix + int(spec.pooler)
        self._check_side(spec.size)
        self.num_patches = (spec.size // self.patch) ** 2
        # Not persistent: the config holds them, and one truth is enough.
        for name, values in (("pixel_mean", spec.mean), ("pixel_std", spec.std)):
            values = torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images `(B, 3, size, size)` in [0, 1].

        Returns:
            Global tokens `(B, G, D)`, class token first, then the trained pooler, then the registers; and patch tokens
            `(B, P, D)` in raster order. Both are after the network's last layer norm.
        """
        expected = (3, self.spec.size, self.spec.size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"The encoder {self.spec.source} takes images (B, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}: use `preprocess`, which crops and resizes."
            )
        return self._run(pixel_values)

    def patches_after(self, pixel_values: Tensor, layer: int | None = None) -> Tensor:
        """Patch tokens `(B, D, h, w)` of squares `(B, 3, s, s)` in [0, 1] as they leave one of the network's layers.

        Args:
            pixel_values: s is any multiple of the patch; positions are interpolated the model's own way.
            layer: From 1 to `depth`, whose tokens are after the last layer norm; by default three quarters of it.

        Raises:
            ValueError: If the layer is not there, s is not a multiple, or the network takes only its own size.
        """
        side = pixel_values.shape[-1]
        self._check_side(side)
        layer = max(1, 3 * self.depth // 4) if layer is None else layer
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= self.depth:
            raise ValueError(f"The layers of {self.spec.source} are 1 to {self.depth}, got {layer!r}.")
        if layer == self.depth:
            patches = self._run(pixel_values)[1]
        else:
            kept: list[Any] = []
            hook = self.layers[layer - 1].register_forward_hook(lambda module, inputs, output: kept.append(output))
            try:
                self._run(pixel_values)
            finally:
                hook.remove()
            sequence = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            patches = self._split(sequence)[1]
        return patches.transpose(1, 2).unflatten(2, (side // self.patch, -1))

    def _check_side(self, side: int) -> None:
        """Refuse images without a whole number of patches, or of another size than a network of timm takes."""
        check_size(side, self.patch, self.spec.source)
        embed = getattr(self.model, "patch_embed", None)
        if getattr(embed, "strict_img_size", False) and tuple(embed.img_size) != (side, side):
            raise ValueError(
                f"{self.spec.source} was built by timm for images of {tuple(embed.img_size)} pixels and gets "
                f"size={side}: give that size, or build it with `dynamic_img_size=True`."
            )

    @property
    def depth(self) -> int:
        """Number of its layers."""
        return len(self.layers)

    @property
    def layers(self) -> nn.ModuleList | nn.Sequential:
        """Its layers, in the order in which they run."""
        if self.spec.backend == "timm":
            return self.model.blocks
        return max((part for part in self.model.modules() if isinstance(part, nn.ModuleList)), key=len)

    def _run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        normalized = (pixel_values.float() - self.pixel_mean) / self.pixel_std
        normalized = normalized.to(next(self.model.parameters()).dtype)
        if self.spec.backend == "timm":
            return self._split(self.model.forward_features(normalized))
        # Only ViTModel needs to be told; the others interpolate (or rotate) their positions by themselves.
        options = {"interpolate_pos_encoding": True} if self.spec.architecture == "vit" else {}
        output = self.model(normalized, **options)
        return self._split(output.last_hidden_state, output.pooler_output if self.spec.pooler else None)

    def _build(self, spec: EncoderSpec) -> nn.Module:
        """The network under float32 defaults (diffusers changes them while it loads), then in the type asked for."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            model = build_model(spec)
        finally:
            torch.set_default_dtype(dtype)
        for path, module in model.named_modules():
            for name, buffer in module.named_buffers(path, recurse=False):
                if buffer.is_floating_point() and not self.is_exact(name):
                    setattr(module, name.rpartition(".")[2], buffer.to(dtype))
        return model

    def _split(self, sequence: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        prefix, patches = sequence[:, : self.num_prefix], sequence[:, self.num_prefix :]
        if pooled is not None:
            prefix = torch.cat([prefix[:, :1], pooled[:, None], prefix[:, 1:]], dim=1)
        return prefix, patches


def build_model(spec: EncoderSpec) -> nn.Module:
    """The network of a spec, with random weights."""
    if forbidden := _FORBIDDEN & set(spec.arguments):
        raise ValueError(f"An encoder's arguments cannot hold {', '.join(sorted(forbidden))}.")
    if spec.backend == "transformers" and spec.architecture in TRANSFORMERS_FAMILIES:
        config_class, model_class = TRANSFORMERS_FAMILIES[spec.architecture]
        options = {"add_pooling_layer": spec.pooler} if spec.architecture == "vit" else {}
        return model_class(config_class.from_dict(dict(spec.arguments)), **options)
    if spec.backend == "timm" and is_timm_family(spec.architecture):
        import timm

        return timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.arguments)
    raise ValueError(f"Cannot build the encoder {spec.backend}/{spec.architecture}. Supported: {SUPPORTED}.")


def is_timm_family(architecture: str) -> bool:
    """Whether timm has this model, and it is one of `TIMM_FAMILIES`."""
    import timm  # takes longer than the rest of a pipeline's imports, and most encoders do without

    name = architecture.split(".")[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.split(".")[-1] in TIMM_FAMILIES


def check_size(size: int, patch: int, name: str) -> None:
    """Refuse a size that does not hold a whole number of patches (Dinov2Model would silently ignore the rest)."""
    if size % patch:
        below = size // patch * patch
        choice = f"{below} or {below + patch}" if below else f"{patch}"
        raise ValueError(
            f"The image size {size} is not a multiple of the patch of {name}, {patch} pixels: give size={choice}."
        )


def describe_model(model: nn.Module, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `backend`, `architecture`, `arguments` and `pooler` of an `EncoderSpec`, read from a module in memory.

    It is a base model without a head. `model_args` are those that a timm model was created with, where timm does not
    remember them.
    """
    for family, (_, model_class) in TRANSFORMERS_FAMILIES.items():
        if type(model) is model_class:
            config = model.config.to_dict()
            _check_channels(config["num_channels"])
            pooler = getattr(model, "pooler", None) is not None
            if pooler and config.get("pooler_output_size", config["hidden_size"]) != config["hidden_size"]:
                raise ValueError(
                    f"The pooler's width {config['pooler_output_size']} is not the encoder's, {config['hidden_size']}."
                )
            arguments = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
            return {"backend": "transformers", "architecture": family, "arguments": arguments, "pooler": pooler}
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None or not is_timm_family(architecture):
        raise ValueError(
            f"Cannot use {type(model).__name__} as an encoder. Supported: {SUPPORTED}. Give the base model, no head."
        )
    _check_channels(model.patch_embed.proj.in_channels)
    arguments = dict(getattr(model, "_model_args", {}) if model_args is None else model_args)
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    return {"backend": "timm", "architecture": architecture, "arguments": arguments, "pooler": False}


def _check_channels(channels: int) -> None:
    if channels != 3:
        raise ValueError(f"The encoder takes {channels} channels; only encoders of 3 (RGB) are supported.")


def _shape(model: nn.Module) -> tuple[int, int, int, bool]:
    """Width, patch, number of tokens before the patches, and whether one of them is a class token."""
    if isinstance(model, transformers.PreTrainedModel):
        config = model.config
        registers = getattr(config, "num_register_tokens", 0)
        return config.hidden_size, _square(config.patch_size), 1 + registers, True
    has_class_token = getattr(model, "cls_token", None) is not None
    return model.num_features, _square(model.patch_embed.patch_size), model.num_prefix_tokens, has_class_token


def _square(patch: int | Sequence[int]) -> int:
    sides = {patch} if isinstance(patch, int) else set(patch)
    if len(sides) != 1:
        raise ValueError(f"Only encoders with square patches are supported, got patches of {tuple(patch)} pixels.")
    return sides.pop()


def name_encoders(sources: Sequence[str]) -> list[str]:
    """The last part of each encoder's source; several of one name are numbered from the second."""
    names: list[str] = []
    met: Counter[str] = Counter()
    for source in sources:
        name = source.rstrip("/").rpartition("/")[2]
        met[name] += 1
        names.append(name if met[name] == 1 else f"{name}-{met[name]}")
    return names


def choose_encoders(sources: Sequence[str], wanted: Sequence[str] | None) -> list[bool]:
    """Of each encoder, whether it is wanted, by its name or its source; None wants all.

    A ValueError that helps with a name that is not there, and of an empty choice.
    """
    if wanted is None:
        return [True] * len(sources)
    if isinstance(wanted, str):
        raise TypeError(f"`encoders` is a list of names: give [{wanted!r}].")
    names = name_encoders(sources)
    known = {source: name for source, name in zip(sources, names, strict=True) if sources.count(source) == 1}
    known |= {name: name for name in names}
    if not len(wanted):
        raise ValueError(f"`encoders` is empty: give at least one of {names}, or None for all.")
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"There is no encoder {name!r} here: did you mean {close[0]!r}? There are {names}.")
    chosen = {known[name] for name in wanted}
    return [name in chosen for name in names]
