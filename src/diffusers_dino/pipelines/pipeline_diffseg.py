"""Segments of an image from the self-attention of a diffusion model, without training or labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import schedules
from ..conditioner import DinoImageConditioner
from ..denoisers import family_of, title_of
from ..diffseg.clusters import FeatureClusters
from ..fusion import TokenFusion, fuse
from ..latents import encode_to_moments, vae_scale_factor
from ..pixels import ImageInput, StoredImages, stored_images, unit_to_vae
from .caching import has_cache
from .checks import (
    Generators,
    check_channels,
    check_choice,
    check_components,
    check_embeds,
    check_finite,
    check_generator,
    check_numbers,
    check_sides,
    image_size,
    initial_noise,
)
from .diffseg_inputs import (
    check_merging,
    chosen_merging,
    encode_empty_prompt,
    for_batch,
    listed_timesteps,
    mask_size,
    merge_thresholds,
)
from .loading import ComponentLoadingMixin
from .lora import DenoiserMixin
from .pipeline_output import DiffSegPipelineOutput
from .segments import SegmentsMixin
from .turns import takes_the_denoiser

__all__ = ["DiffSegPipeline"]

_SQUARE_AT_MOST = 4096  # pixels of the side of an image that is stretched at its own resolution


class DiffSegPipeline(SegmentsMixin, ComponentLoadingMixin, DiffusionPipeline, DenoiserMixin):
    """Segment images by DiffSeg (Tian et al., CVPR 2024): merge the self-attention maps of one denoising step.

    Made with `from_pipe`: of a `DinoDiffusionPipeline`, the condition is the image's own tokens; of a Stable Diffusion
    (1, 2, XL), the empty prompt. An unconditional `UNet2DModel` needs no condition. In a transformer, the positions
    are its patches, and of joint attention the image's part is read.

    Images are stretched to a square for the model, and masks back to the image's size, so every pixel gets a segment.

    Args:
        unet: Denoiser with spatial self-attention; a ValueError if it takes other latents than the VAE makes.
        scheduler: Its noise schedule; the range of timesteps, and how noise is added where it is asked for.
        vae: Autoencoder of images with 1 or 3 channels; None for a UNet on pixels.
        conditioner: Images to condition tokens.
        text_encoder: Encoder of the empty prompt, used without a conditioner.
        tokenizer: Of `text_encoder`.
        text_encoder_2: Second one, of Stable Diffusion XL.
        tokenizer_2: Of `text_encoder_2`.
        fusion: What tells the tokens of several encoders apart, if the denoiser was trained with it.
        transformer: Denoiser in place of a UNet, of a class in `diffusers_dino.denoisers`; it needs a `conditioner`,
            or `image_embeds` in each call.

    Example:
        ```python
        from diffusers.utils import load_image
        from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline

        pipe = DiffSegPipeline.from_pipe(DinoDiffusionPipeline.from_pretrained("outputs/quickstart/model"))
        masks = pipe(load_image("radiograph.png")).masks  # (1, H, W)
        ```
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->conditioner->fusion->vae->unet->transformer"
    _optional_components = [  # noqa: RUF012
        *("vae", "conditioner", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("unet", "scheduler", "fusion", "transformer"),
    ]
    _unlisted_if_none = ("fusion", "transformer")

    def __init__(
        self,
        unet: UNet2DConditionModel | UNet2DModel | None = None,
        scheduler: KarrasDiffusionSchedulers | None = None,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        conditioner: DinoImageConditioner | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        fusion: TokenFusion | None = None,
        transformer: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            conditioner=conditioner,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            fusion=fusion,
            transformer=transformer,
        )
        self._check_denoiser()

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side; 1 without a VAE."""
        return vae_scale_factor(self.vae) if self.vae is not None else 1

    def check_inputs(
        self,
        timestep: int | Sequence[int],
        size: int | None = None,
        generator: Generators = None,
        image_embeds: Tensor | None = None,
        unet_kwargs: Mapping[str, Any] | None = None,
        add_noise: bool = False,
    ) -> None:
        """Refuse what cannot work before any work is done; arguments and errors as in `__call__`."""
        if self.denoiser is None or self.scheduler is None:
            raise ValueError("This pipeline has no unet or no scheduler; both are needed to segment.")
        self._check_denoiser()
        config = self.scheduler.config
        if add_noise and "beta_schedule" not in config and not schedules.is_flow(self.scheduler):
            raise ValueError(
                f"{type(self.scheduler).__name__} adds noise in a way of its own, which is not known "
                "here: leave add_noise=False, as DiffSeg does."
            )
        if has_cache(self.denoiser):
            raise ValueError(
                "The UNet has a cache (enable_cache), which leaves out layers whose attention is read here: call "
                "disable_cache() of the pipeline that it belongs to."
            )
        listed_timesteps(timestep, config["num_train_timesteps"])
        if self.transformer is None:
            check_numbers(self.vae_scale_factor, size=self._size(size))
        else:
            check_sides(self, size=self._size(size))
        check_generator(generator)
        if image_embeds is not None:
            if not self._is_conditional:
                raise ValueError("This UNet takes no condition: leave `image_embeds` out.")
            check_embeds(image_embeds, None, self._token_width)
        given = image_embeds is not None or "encoder_hidden_states" in (unet_kwargs or {})
        if self.transformer is not None and unet_kwargs:
            raise ValueError("`unet_kwargs` are of a UNet, and this pipeline has a transformer: leave them out.")
        prompted = self.transformer is None and self.text_encoder is not None and self.tokenizer is not None
        if self._is_conditional and not given and self.conditioner is None and not prompted:
            lacking = "neither a conditioner nor a text encoder with its tokenizer"
            raise ValueError(
                f"The {title_of(self.denoiser)} needs a condition, and this pipeline has "
                f"{lacking if self.transformer is None else 'no conditioner'}. Load them, or give `image_embeds`."
            )

    def encode_condition(self, images: ImageInput, size: int | None = None) -> dict[str, Any]:
        """The condition of the denoiser: the images' own tokens, the empty prompt, or none for an unconditional UNet.

        Args:
            images: B images of any type that `diffusers_dino.pixels.to_unit` reads, sizes may differ; they are
                stretched to squares.
            size: Side in pixels that the model sees them at; by default the denoiser's.

        Returns:
            Keyword arguments of a UNet, for B images or for one that stands for all.
        """
        device = self._execution_device
        if not self._is_conditional:
            return {}
        if self.conditioner is not None:
            pixels = send_to_device(self.conditioner.preprocess(images, crop=False), device)
            return {"encoder_hidden_states": fuse(self.fusion, self.conditioner(pixels))}
        encoders = [(self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)]
        return encode_empty_prompt(self.unet, encoders, self._size(size), device)

    def prepare_latents(self, images: ImageInput, size: int | None = None) -> Tensor:
        """Encode images, stretched to squares, to clean latents: the mean of the VAE's distribution.

        `images` and `size` are as in `encode_condition`; the result is `(B, L, size / f, size / f)` with f pixels per
        latent, or pixels in [-1, 1] without a VAE.
        """
        size, model = self._size(size), self.vae if self.vae is not None else self.denoiser
        squares = torch.cat([each.resized(size, "bicubic") for each in stored_images(images)])
        pixels = unit_to_vae(squares, model.config["in_channels"]).to(self._execution_device, model.dtype)
        latents = pixels if self.vae is None else encode_to_moments(self.vae, pixels)[0]
        check_finite(latents, "latents")
        return latents.to(self.denoiser.dtype)

    @takes_the_denoiser
    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        timestep: int | Sequence[int] | None = None,
        merge_threshold: float | Sequence[float] | None = None,
        num_merges: int = 3,
        anchors_per_side: int | None = None,
        relative_threshold: bool | None = None,
        refine: bool = False,
        size: int | None = None,
        sides: Collection[int] | None = None,
        layers: Collection[str] | Literal["all"] | None = None,
        weights: Mapping[int, float] | None = None,
        add_noise: bool = False,
        generator: Generators = None,
        image_embeds: Tensor | None = None,
        unet_kwargs: Mapping[str, Any] | None = None,
        output_size: int | tuple[int, int] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        *,
        features: str | Sequence[str] = "attention",
        merging: str | None = None,
        cut_threshold: float | None = None,
        cut_power: float = 4.0,
        walk_steps: int = 2,
        clusters: FeatureClusters | None = None,
        encoder_size: int | None = None,
        encoder_layer: int | None = None,
    ) -> DiffSegPipelineOutput | tuple:
        """Segment B images.

        Args:
            image: B images of any type that `diffusers_dino.pixels.to_unit` reads.
            timestep: Of the denoising step whose attention is read, or several, over which maps are averaged: from 0,
                an image, to the scheduler's `num_train_timesteps` - 1, noise. Of a flow it is that share of its time.
                By default that of `settings`; of features 50.
            merge_threshold: Maps less than this apart, in nats of symmetric Kullback-Leibler divergence, are one
                segment; one for all passes, or a sequence with one for each. Infinity gives one segment. By default
                that of `settings` with `relative_threshold`, and 0.5 without.
            num_merges: Passes of merging, where `merge_threshold` is one number.
            anchors_per_side: Of the grid of maps that merging starts from; by default 16, or s where that is less.
            relative_threshold: Whether `merge_threshold` is in units of the mean divergence between the image's maps,
                which makes it comparable between models, timesteps and images; 0.3 to 0.4 is a start. By default
                only where no `merge_threshold` is given.
            refine: Refine by k-means over all maps. Needs scikit-learn (`pip install diffusers-dino[eval]`).
            size: Side in pixels that images are stretched to for the model; by default what its config says.
            sides: Side lengths of the self-attention layers to use, in latents or patches; by default all.
            layers: Names of the self-attention layers to use, or of their blocks, such as `["up_blocks"]`: the first
                layer of the decoder's largest resolution may segment better than all; `"all"`: all. By default those
                of `settings`, or all of the `sides` that are given.
            weights: Weight of each side; by default in proportion to it.
            add_noise: Whether to add noise of the timestep to the latents. DiffSeg gives the model the clean latents.
            generator: Of that noise: one, or a list of B.
            image_embeds: Condition tokens `(B or 1, S, D)` in place of the image's own or the empty prompt's.
            unet_kwargs: Further inputs that the UNet needs, such as `class_labels`, for B images or for one.
            output_size: Height and width of the masks, or the side of square ones; by default the images' size.
            output_type: `"pt"` or `"np"`.
            return_dict: False returns a tuple.
            features: `"attention"` maps, or those of `patch_features`: `"unet"`, `"encoder"`, or both in a list.
            merging: `"kl"`, DiffSeg's, of attention; or `"ncut"`, recursive normalised cuts of attention (arXiv
                2412.04678) or of features (DiffCut, arXiv 2406.02842). By default what DiffSeg or DiffCut does.
            cut_threshold: With `"ncut"`, the largest cost of a cut, in (0, 2]; higher gives more segments. By default
                0.2 of features, and 0.5 of attention.
            cut_power: With `"ncut"` of features, what sharpens their cosines: DiffCut's alpha. Features are centred
                here, so it is lower than DiffCut's 10.
            walk_steps: With `"ncut"` of attention, the power of its matrix: steps of a random walk.
            clusters: What `fit_clusters` gave, in place of merging. They say themselves of which features they are:
                leave `features`, `merging`, `timestep`, `size`, `layers` and `encoder_*` out.
            encoder_size: See `patch_features`.
            encoder_layer: See `patch_features`.

        Returns:
            Masks `(B, H, W)`, merged maps (of clusters, their probabilities) and numbers of segments.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong value, a component is missing, the UNet has no self-attention at
                a side that was asked for, or images of different sizes come without an `output_size`.
            RuntimeError: If the latents come out with NaN or infinity, or another call uses the pipeline or its UNet.
        """
        # 1. Check, before the model runs
        step = {} if timestep is None else {"timestep": timestep}
        step |= {"size": size, "layers": layers, "image_embeds": image_embeds, "unet_kwargs": unet_kwargs}
        of_maps = {"sides": sides, "weights": weights, "add_noise": add_noise}
        encoded = {"encoder_size": encoder_size, "encoder_layer": encoder_layer}
        merged = {
            "merge_threshold": merge_threshold,
            "relative_threshold": relative_threshold,
            "anchors_per_side": anchors_per_side,
            "refine": refine,
        }
        cut = {} if cut_threshold is None else {"cut_threshold": cut_threshold}
        merging = chosen_merging(features, merging, clusters, **step, **of_maps, **encoded, **merged, **cut)
        merge_thresholds(merge_threshold, num_merges, relative_threshold, self.settings.merge_threshold)
        check_merging(merging, walk_steps=walk_steps, cut_power=cut_power, **cut)
        check_choice(("pt", "np"), output_type=output_type)
        images = stored_images(image)
        sizes = sorted({each.size for each in images})
        if output_size is None and len(sizes) > 1:
            raise ValueError(
                f"The images have different sizes, {sizes}, and masks of one batch have one: give `output_size`, or "
                "call once for each size."
            )
        output_size = mask_size(sizes[0] if output_size is None else output_size)

        # 2. Read attention or features
        if clusters is not None:
            read = self.patch_features(images, **clusters.settings, image_embeds=image_embeds, unet_kwargs=unet_kwargs)
            merge = partial(self.segment_features, clusters=clusters)
        elif features != "attention":
            read = self.patch_features(images, features, **step, **encoded)
            merge = partial(self.segment_features, cut_power=cut_power, **cut)
        else:
            read = self.attention_maps(images, **step, **of_maps, generator=generator)
            merge = partial(
                self.segment, **merged, num_merges=num_merges, merging=merging, walk_steps=walk_steps, **cut
            )
        self.maybe_free_model_hooks()

        # 3. Merge
        output = merge(read, output_size=output_size, output_type=output_type)
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        image: ImageInput,
        timestep: int | Sequence[int],
        size: int | None,
        add_noise: bool,
        generator: Generators,
        image_embeds: Tensor | None,
        unet_kwargs: Mapping[str, Any] | None,
    ) -> int:
        """Run the denoiser on B images at each timestep, for those who capture what its layers do; returns B."""
        images = [
            # where that is large, images go straight to the size of the model
            StoredImages.of(each.resized(max(each.size), "bicubic")) if max(each.size) <= _SQUARE_AT_MOST else each
            for each in stored_images(image)
        ]
        batch_size = sum(map(len, images))
        check_generator(generator, batch_size)
        given = dict(unet_kwargs or {})
        if image_embeds is not None:
            given["encoder_hidden_states"] = fuse(self.fusion, image_embeds.to(self._execution_device))
        condition = given if "encoder_hidden_states" in given else self.encode_condition(images, size) | given
        latents = self.prepare_latents(images, size)
        condition = for_batch(condition, batch_size, latents.dtype, latents.device)
        if add_noise:
            noise = initial_noise(tuple(latents.shape), latents.device, generator).to(latents.dtype)
        for t in listed_timesteps(timestep, self.scheduler.config["num_train_timesteps"]):
            steps = torch.full((len(latents),), t, device=latents.device)
            inputs = schedules.add_noise(self.scheduler, latents, noise, steps) if add_noise else latents
            if self.transformer is None:
                self.unet(inputs, steps, **condition, return_dict=False)
            else:
                tokens = condition["encoder_hidden_states"]
                family_of(self.transformer).predict(self.transformer, inputs, steps, tokens)
        return batch_size

    @property
    def _is_conditional(self) -> bool:
        """Asked of the config, as a compiled UNet has another class."""
        return self.transformer is not None or self.unet.config.get("cross_attention_dim") is not None

    @property
    def _token_width(self) -> int | None:
        """Width of the condition, which need not be the only one; None of a UNet whose blocks differ."""
        if self.transformer is not None:
            return family_of(self.transformer).token_width(self.transformer.config)
        width = self.unet.config.get("encoder_hid_dim") or self.unet.config["cross_attention_dim"]
        return width if isinstance(width, int) else None

    def _check_denoiser(self) -> None:
        """A UNet may be of any kind that takes the VAE's latents, a transformer must be of a family."""
        if self.transformer is None:
            check_channels(self.vae, self.unet, "in_channels")
        else:
            check_components(self)

    def _size(self, size: int | None) -> int:
        return image_size(self) if size is None else size
