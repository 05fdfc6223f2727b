"""Images to condition tokens: frozen DINO encoders with their preprocessing, as one component of a pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import send_to_device
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .diffseg.features import stack_features
from .encoders import Encoder, EncoderSpec, ExactBuffers, LastingModelMixin, load_encoder
from .encoders.model import choose_encoders, describe_model, name_encoders
from .encoders.tokens import TOKENS, Moments, TokenHead, semi_orthogonal
from .familiarity import FamiliarityMixin
from .fingerprints import as_json, hash_of
from .pixels import ImageInput, stored_images
from .seeds import generator_for

__all__ = ["DinoImageConditioner"]

PixelValues = Tensor | tuple[Tensor, ...]
_MIN_IMAGES = 16  # the standard error of a standard deviation is then about a sixth of it


class DinoImageConditioner(FamiliarityMixin, ExactBuffers, LastingModelMixin, ConfigMixin):
    """The condition of a latent diffusion model: tokens of frozen DINO encoders (DiNO-Diffusion, section 2.3).

    Make one with `from_encoder` (a checkpoint) or `from_model` (a module in memory), and read a saved one with
    `from_pretrained`. The saved form holds the encoders' weights and preprocessing, the projection, the statistics and
    the null condition; it needs neither the encoders' own repositories nor the network.

    Encoders stay frozen and in evaluation mode whatever `train()` says. `to(dtype)` casts the encoders; the pixel and
    token statistics, the projection and the null condition stay float32, and tokens come out in the encoders' type.

    Args:
        encoders: A dictionary of `EncoderSpec` for each encoder.
        tokens: `"global"` (class token, trained pooler where there is one, registers), `"cls"`, `"patch"` or `"all"`
            (global, then patches).
        projection_dim: Width that the tokens are projected to, or None to keep the encoder's.
        projection_seed: Seed of the projections.

    Attributes:
        token_statistics: Of the training images' tokens, for `familiarity`; None until `fit_familiarity`.

    Raises:
        ValueError: If an encoder cannot be built, `tokens` is unknown or not what an encoder has, or several encoders
            differ in width and no `projection_dim` is given.
    """

    _keep_in_fp32_modules = ["heads", "null_tokens"]  # noqa: RUF012
    exact_buffers = ("null_tokens",)
    _no_split_modules = ["Encoder"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self, *, encoders: Sequence[Mapping[str, Any]], tokens: str, projection_dim: int | None, projection_seed: int
    ) -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"`tokens` must be one of {', '.join(TOKENS)}, got {tokens!r}.")
        self.image_encoders = nn.ModuleList(Encoder(EncoderSpec.from_dict(spec)) for spec in encoders)
        if not len(encoders):
            raise ValueError("A conditioner needs at least one encoder.")
        if projection_dim is not None and projection_dim < 1:
            raise ValueError(f"`projection_dim` must be positive, got {projection_dim}.")
        widths = [encoder.width for encoder in self.image_encoders]
        if projection_dim is None and len(set(widths)) > 1:
            raise ValueError(f"The encoders' tokens have widths {widths}: give a common `projection_dim`.")
        generator = torch.Generator("cpu").manual_seed(projection_seed)
        self.heads = nn.ModuleList(
            TokenHead(
                encoder,
                tokens,
                None if projection_dim is None else semi_orthogonal(projection_dim, encoder.width, generator),
            )
            for encoder in self.image_encoders
        )
        self.register_buffer("null_tokens", torch.zeros(self.num_tokens, self.token_dim, dtype=torch.float32))
        self.requires_grad_(False).eval()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        tokens: str = "global",
        projection_dim: int | None = None,
        projection_seed: int = 0,
        size: int | Sequence[int] | None = None,
        revision: str | Sequence[str | None] | None = None,
        dtype: torch.dtype = torch.float32,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> DinoImageConditioner:
        """Wrap the checkpoint of an encoder, or of several side by side; `ValueError`s are as for the class.

        Args:
            name_or_path: Hub id or folder of a DINOv1, DINOv2 (also with registers, also RAD-DINO) or DINOv3 ViT in
                transformers' format, or of a ViT in timm's (`timm/vit_base_patch14_reg4_dinov2.lvd142m`); or a list.
            tokens: Which tokens to give, see the class.
            projection_dim: Project the tokens to this width, the UNet's `cross_attention_dim`, by a fixed matrix with
                orthonormal rows or columns. Needed for encoders of different widths.
            projection_seed: Seed of the projections, which are saved.
            size: Side in pixels of the images that the encoder sees, instead of its image processor's; position
                embeddings are interpolated the model's own way. A list gives one each.
            revision: Branch, tag or commit on the Hub. A list gives one each.
            dtype: Type of the encoders' weights.
            token: Credential for gated repositories, as in huggingface_hub.
            cache_dir: Folder for downloads.
            local_files_only: Use only downloaded files.

        Raises:
            FileNotFoundError: If a checkpoint lacks its config, its preprocessing, or weights in safetensors.
        """
        names = [name_or_path] if isinstance(name_or_path, (str, os.PathLike)) else list(name_or_path)
        sides, commits = _for_each(size, names, "size"), _for_each(revision, names, "revision")
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        loaded = [
            load_encoder(name, size=side, revision=commit, **hub)
            for name, side, commit in zip(names, sides, commits, strict=True)
        ]
        conditioner = cls._assemble(
            loaded, tokens=tokens, projection_dim=projection_dim, projection_seed=projection_seed
        )
        conditioner.image_encoders.to(dtype)
        return conditioner

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resample: str = "bicubic",
        tokens: str = "global",
        projection_dim: int | None = None,
        projection_seed: int = 0,
        source: str = "in memory",
        model_args: Mapping[str, Any] | None = None,
    ) -> DinoImageConditioner:
        """Wrap a copy of an encoder in memory, for example one that was just trained.

        `tokens`, `projection_dim` and `projection_seed` are as in `from_encoder`; `size`, `mean`, `std` and `resample`
        describe its preprocessing as in `EncoderSpec`, and `source` is what to record as its name.

        Args:
            model: A `ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel` of transformers, or a
                ViT of timm. The pooler of a `ViTModel` counts as trained: where it is not, make the model with
                `add_pooling_layer=False`.
            model_args: Arguments that a timm model was created with, where timm does not remember them.

        Raises:
            ValueError: If the model is not supported, or cannot be built again from its config.
        """
        spec = EncoderSpec(
            **describe_model(model, model_args),
            size=size,
            resample=resample,
            mean=[float(v) for v in mean],
            std=[float(v) for v in std],
            source=source,
            revision=None,
        )
        backbone = deepcopy(model)
        if hasattr(backbone, "reset_classifier"):  # timm's models may carry one
            backbone.reset_classifier(0)
        return cls._assemble(
            [(spec, backbone)], tokens=tokens, projection_dim=projection_dim, projection_seed=projection_seed
        )

    @classmethod
    def _assemble(cls, loaded: list[tuple[EncoderSpec, nn.Module]], **config: Any) -> DinoImageConditioner:
        """Build from only the config, as `from_pretrained` will, then take the weights over without a copy."""
        with init_empty_weights():
            conditioner = cls(encoders=[spec.to_dict() for spec, _ in loaded], **config)
        for encoder, (spec, model) in zip(conditioner.image_encoders, loaded, strict=True):
            try:
                encoder.model.load_state_dict(model.state_dict(), strict=True, assign=True)
            except RuntimeError as error:
                hint = " Give the arguments of timm.create_model as `model_args`." if spec.backend == "timm" else ""
                raise ValueError(f"The encoder {spec.source} is not what its config says.{hint} {error}") from error
        device = next(loaded[0][1].parameters()).device  # the encoder's; the buffers were made on the CPU
        return conditioner.requires_grad_(False).to(device)

    def with_tokens(self, tokens: str | None) -> DinoImageConditioner:
        """The same encoders, weights shared, giving other tokens; the same object if they are the same, or None.

        Statistics belong to a choice of tokens, and so does the null condition: the new one has none and zero. Call
        `fit_normalization` before training with it.

        Args:
            tokens: `"global"`, `"cls"`, `"patch"` or `"all"`.

        Raises:
            ValueError: As for the class.
        """
        if tokens in (None, self.config["tokens"]):
            return self
        loaded = [(encoder.spec, encoder.model) for encoder in self.image_encoders]
        projection = {name: self.config[name] for name in ("projection_dim", "projection_seed")}
        return self._assemble(loaded, tokens=tokens, **projection)

    @property
    def num_tokens(self) -> int:
        """Number of condition tokens of an image, over all encoders."""
        return sum(self.tokens_per_encoder)

    @property
    def token_dim(self) -> int:
        """Width of the tokens: the `cross_attention_dim` that a UNet needs."""
        return self.heads[0].dim

    @property
    def tokens_per_encoder(self) -> list[int]:
        """Number of condition tokens of each encoder, in their order."""
        return [head.num_tokens for head in self.heads]

    @property
    def encoder_names(self) -> list[str]:
        """What to call each encoder: the last part of its source; several of one name are numbered from the second."""
        return name_encoders(self._sources)

    @property
    def _sources(self) -> list[str]:
        return [encoder.spec.source for encoder in self.image_encoders]

    @property
    def image_size(self) -> int | tuple[int, ...]:
        """Side in pixels of the images that `forward` takes; one for each of several encoders."""
        sizes = tuple(encoder.spec.size for encoder in self.image_encoders)
        return sizes[0] if len(sizes) == 1 else sizes

    @property
    def _repeated_blocks(self) -> list[str]:
        """What diffusers' `compile_repeated_blocks` compiles: the classes of the encoders' layers."""
        return sorted({type(layer).__name__ for encoder in self.image_encoders for layer in encoder.layers})

    @property
    def layout(self) -> dict[str, Any]:
        """What tells these tokens from others of the same width, to be noted with the model that is trained on them.

        `settings` is a hash of the config (the encoders with their preprocessing, the choice of tokens, the
        projection), `statistics` the root mean squares of each head's mean, standard deviation and projection.
        Neither depends on the weights' type. The null condition has no part in it.
        """
        settings = {name: self.config[name] for name in ("encoders", "tokens", "projection_dim", "projection_seed")}
        buffers = (buffer for head in self.heads for buffer in (head.mean, head.std, head.projection))
        return {
            "settings": hash_of(json.dumps(as_json(settings), sort_keys=True))[:16],
            "statistics": [buffer.square().mean().sqrt().item() for buffer in buffers if buffer is not None],
        }

    def preprocess(self, images: ImageInput, crop: bool = True) -> PixelValues:
        """Crop images to their central square and resize it, antialiased, to what the encoder sees.

        The whole square is kept, so that encoder and autoencoder see the same crop: image processors that cut a border
        off after resizing (256 to 224 pixels, say) are followed in size, not in the cut.

        Args:
            images: One or a list of B, of any type that `diffusers_dino.pixels.to_unit` reads, with its errors; a
                ValueError also if one is smaller than a patch.
            crop: False stretches whole images to squares in place of cropping them, as DiffSeg does.

        Returns:
            `(B, 3, size, size)` float32 in [0, 1], differentiable; a tuple of them for several encoders.
        """
        stored = stored_images(images)
        patch, side_of = max(encoder.patch for encoder in self.image_encoders), min if crop else max
        for each in stored:
            if (side := side_of(each.size)) < patch:
                raise ValueError(
                    f"An image is smaller than a patch of the encoder: its {'short' if crop else 'long'}er side has "
                    f"{side} pixels, a patch {patch}."
                )
        squares = [each.center_square() if crop else each for each in stored]
        specs = [encoder.spec for encoder in self.image_encoders]
        resized = tuple(torch.cat([each.resized(spec.size, spec.resample) for each in squares]) for spec in specs)
        return resized[0] if len(resized) == 1 else resized

    def forward(self, pixel_values: PixelValues, encoders: Sequence[str] | None = None) -> Tensor:
        """Encode what `preprocess` gives.

        Args:
            pixel_values: `(B, 3, size, size)` in [0, 1]; a tuple of them for several encoders.
            encoders: Names of the encoders to use, of `encoder_names` or their whole sources; by default all. The
                null condition takes the place of the others' tokens, and they are not run.

        Returns:
            Tokens `(B, num_tokens, token_dim)` in the encoders' type: of each encoder in turn, its class token, its
            trained pooler, its registers, its patches in raster order, as far as `tokens` asks for them.
        """
        chosen, batches = choose_encoders(self._sources, encoders), self._batches(pixel_values)
        nulls = self.null_condition(len(batches[0])).split(self.tokens_per_encoder, dim=1)
        parts = zip(self.image_encoders, self.heads, batches, nulls, chosen, strict=True)
        tokens = [head(*encoder(batch)) if wanted else null for encoder, head, batch, null, wanted in parts]
        return torch.cat(tokens, dim=1).to(self.dtype)  # (B, S, D)

    def encode(self, images: ImageInput, encoders: Sequence[str] | None = None) -> Tensor:
        """Tokens `(B, num_tokens, token_dim)` of what `preprocess` takes as `images`, on this module's device.

        `encoders` are as in `forward`. Gradients flow if an image requires them; otherwise none are recorded.
        """
        # Not `self.device`: under sequential offloading that is where the parameters wait, the buffers say more.
        pixel_values = send_to_device(self.preprocess(images), self.null_tokens.device)
        wanted = any(batch.requires_grad for batch in self._batches(pixel_values))
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return self(pixel_values, encoders)

    @apply_forward_hook  # offloading brings the encoders
    @torch.no_grad()
    def patch_features(self, images: ImageInput, size: int | None = None, layer: int | None = None) -> Tensor:
        """Patch tokens of whole images as maps, not standardised or projected, whatever tokens are the condition.

        Args:
            images: B images as in `preprocess`; they are stretched to squares.
            size: Side in pixels that the encoders see, a multiple of their patches; by default their own. Twice as
                many pixels along a side give four times as many patches.
            layer: Of the encoders, from 1, that the tokens leave; by default the one at three quarters of the depth.

        Returns:
            `(B, D, h, w)` float32. Of several encoders the channels stand one after the other, on the finest grid.
        """
        stored, maps = stored_images(images), []
        for encoder in self.image_encoders:
            side = encoder.spec.size if size is None else size
            squares = torch.cat([each.resized(side, encoder.spec.resample) for each in stored])
            maps.append(encoder.patches_after(squares.to(self.null_tokens.device), layer).float())
        return stack_features(maps) if len(maps) > 1 else maps[0]

    def null_condition(self, batch_size: int) -> Tensor:
        """The condition of guidance's unconditional half, `(batch_size, num_tokens, token_dim)`.

        It lives in the output space, is zero unless `null_tokens` is set, and is saved with the weights, so that
        training and sampling share it. It is repeated `batch_size` times without a copy.
        """
        return self.null_tokens.to(self.dtype).expand(batch_size, -1, -1)

    @torch.no_grad()
    def fit_normalization(self, batches: Iterable[ImageInput], slot_offset: float = 1.0) -> None:
        """Standardise tokens by the mean and standard deviation of these images' tokens, channel by channel.

        Each global token has its own statistics; patch tokens share theirs. They come before the projection, replace
        earlier ones, and are saved. Channels that hardly vary (under a hundredth of the token's root mean square
        deviation) are divided by that bound, so that their noise is not blown up.

        Cross-attention sees a set: once every slot has mean 0, nothing would tell the class token from a register. So
        each slot gets a fixed random vector as its new mean, the same for every conditioner of this shape.

        Args:
            batches: Images, batch by batch; a ValueError if they are fewer than 16 in all, or a token is not finite.
            slot_offset: Root mean square of that vector, in standard deviations of the tokens; 0 for none.
        """
        moments, count = [Moments(head) for head in self.heads], 0
        for batch in batches:
            pixels = self._batches(send_to_device(self.preprocess(batch), self.null_tokens.device))
            for encoder, head, moment, own in zip(self.image_encoders, self.heads, moments, pixels, strict=True):
                moment.update(*head.select(*encoder(own)))
            count += len(pixels[0])
        if count < _MIN_IMAGES:
            raise ValueError(f"Statistics of tokens need at least {_MIN_IMAGES} images, got {count}.")
        if sum(len(head.mean) for head in self.heads) == 1:
            slot_offset = 0.0  # there is nothing to tell apart
        for number, (head, moment) in enumerate(zip(self.heads, moments, strict=True)):
            mean, std = moment.mean_and_std()
            offset = slot_offset * torch.randn(mean.shape, generator=generator_for("slots", number))
            head.mean.copy_(mean - offset * std)
            head.std.copy_(std)
        self.token_statistics = None  # were of other tokens

    def train(self, mode: bool = True) -> DinoImageConditioner:
        """Does nothing: a frozen encoder stays in evaluation mode, whatever `mode` says."""
        return super().train(False)

    def _batches(self, pixel_values: PixelValues) -> tuple[Tensor, ...]:
        """The pixel values of each encoder."""
        batches = (pixel_values,) if isinstance(pixel_values, Tensor) else tuple(pixel_values)
        if len(batches) != len(self.image_encoders):
            raise ValueError(f"Expected pixel values for {len(self.image_encoders)} encoders, got {len(batches)}.")
        return batches


def _for_each(value: Any, names: list[Any], what: str) -> list[Any]:
    """One value for each encoder: the same for all, or a list of them."""
    if value is None or isinstance(value, (str, int)):
        return [value] * len(names)
    if len(value) != len(names):
        raise ValueError(f"`{what}` has {len(value)} values for {len(names)} encoders.")
    return list(value)
