"""Load or build the four parts of a pipeline, to train it or to use what a training left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    AutoModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.attention_processor import Attention
from torch import nn

from ..conditioner import DinoImageConditioner
from ..extras import require
from ..fusion import TokenFusion, check_dropout
from ..latents import VAE, vae_scale_factor
from ..pipelines import DinoDiffusionPipeline
from ..pipelines.loading import check_condition, note_condition
from ..schedules import is_flow

__all__ = [
    "STABLE_DIFFUSION_SCHEDULE",
    "adapt_for_training",
    "add_fusion",
    "add_lora",
    "build_pipeline",
    "enable_xformers",
    "frozen_dtype",
    "latent_shape",
    "load_trained_pipeline",
    "load_unet",
    "load_vae",
    "make_scheduler",
    "new_unet",
    "on_device",
]

# diffusers' bare schedulers are not Stable Diffusion's: theirs is linear and clips samples.
STABLE_DIFFUSION_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_pipeline(
    vae: VAE,
    conditioner: DinoImageConditioner,
    *,
    resolution: int,
    base: str | None = None,
    unet: str | None = None,
    unet_config: str | None = None,
    qk_init_scale: float = 1.0,
    scheduler: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool = False,
    flow_shift: float | None = None,
    **hub: Any,
) -> DinoDiffusionPipeline:
    """Put a pipeline together from parts that are loaded or new.

    Args:
        vae: The autoencoder.
        conditioner: The conditioner.
        resolution: Side of the training images in pixels.
        base: A pipeline such as Stable Diffusion, for the parts that are not given.
        unet: Folder or repository of a UNet.
        unet_config: Make a new UNet of this config, with `qk_init_scale`, by `new_unet`.
        scheduler: Config for `make_scheduler`, as are `prediction_type`, `zero_snr` and `flow_shift`.
        hub: `revision`, `variant` and the like for `base`.

    Raises:
        ValueError: If there is no UNet, or the parts do not fit together.
    """
    if not (unet or unet_config or base):
        raise ValueError("There is no UNet: give one, the config of a new one, or a pretrained model.")
    if unet_config:
        denoiser = new_unet(unet_config, vae, conditioner.token_dim, resolution, qk_init_scale)
    else:
        denoiser = load_unet(unet) if unet else load_unet(base, **hub)
    schedule = make_scheduler(scheduler or base, prediction_type, zero_snr, flow_shift)
    return DinoDiffusionPipeline(
        vae=vae, conditioner=conditioner, unet=denoiser, scheduler=schedule, flow_matching=is_flow(schedule)
    )


def load_trained_pipeline(name_or_path: str | Path, dtype: torch.dtype | None = None) -> DinoDiffusionPipeline:
    """Load a pipeline's folder or repository, or `RUN/checkpoint-500` (or `best`), whose other parts lie in `RUN`.

    If the run averaged its weights, `unet/` of a checkpoint holds the average, which is loaded. A LoRA is fused into
    the weights of the pipeline that it was trained on. FileNotFoundError if a part is missing.
    """
    folder, options = Path(name_or_path), {} if dtype is None else {"dtype": dtype}
    run = folder.resolve().parent
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return DinoDiffusionPipeline.from_pretrained(str(name_or_path), **options)
    if (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        base = json.loads((run / "training_arguments.json").read_text())["pretrained_pipeline"]
        pipe = DinoDiffusionPipeline.from_pretrained(base, **options)
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe
    if not (folder / "unet").is_dir() or not (run / "conditioner").is_dir():
        raise FileNotFoundError(
            f"{name_or_path} is not a pipeline (it has no model_index.json) and not a checkpoint of a training run "
            "(unet/ in it, and conditioner/ beside it)."
        )
    pipe = DinoDiffusionPipeline(
        vae=load_vae(str(run)),
        conditioner=DinoImageConditioner.from_pretrained(run, subfolder="conditioner"),
        unet=load_unet(str(folder)),
        scheduler=make_scheduler(str(run)),
        fusion=TokenFusion.from_pretrained(folder, subfolder="fusion") if (folder / "fusion").is_dir() else None,
    )
    check_condition(pipe.unet, pipe.conditioner, name_or_path)
    return pipe if dtype is None else pipe.to(dtype)


def load_vae(name_or_path: str, **hub: Any) -> VAE:
    """Load an autoencoder from its own folder or repository, or from the `vae` of a pipeline.

    ValueError if it is not an autoencoder that this package can use.
    """
    vae = _load(name_or_path, "vae", **hub)
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        raise ValueError(
            f"{name_or_path!r} is a {type(vae).__name__}, but the VAE must be an AutoencoderKL or AutoencoderTiny."
        )
    return vae


def load_unet(name_or_path: str, **hub: Any) -> UNet2DConditionModel:
    """Load a UNet from its own folder or repository, or from the `unet` of a pipeline.

    ValueError if it is not a `UNet2DConditionModel`.
    """
    unet = _load(name_or_path, "unet", **hub)
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"{name_or_path!r} is a {type(unet).__name__}, but the UNet must be a UNet2DConditionModel.")
    return unet


def _load(name_or_path: str, subfolder: str, **hub: Any) -> torch.nn.Module:
    """Load a model from where its config is: the place itself, or the subfolder that a pipeline keeps it in."""
    folder, hub = Path(name_or_path), {"use_safetensors": True, **hub}
    if folder.is_dir():
        inside = not (folder / "config.json").is_file()
        if inside and not (folder / subfolder / "config.json").is_file():
            raise FileNotFoundError(f"There is no config.json in {folder} nor in {folder / subfolder}.")
        return AutoModel.from_pretrained(name_or_path, subfolder=subfolder if inside else None, **hub)
    try:
        return AutoModel.from_pretrained(name_or_path, subfolder=subfolder, **hub)
    except (OSError, ValueError) as in_subfolder:
        try:
            return AutoModel.from_pretrained(name_or_path, **hub)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name_or_path!r} is not a folder, and the Hub gave no {subfolder} for it: {error}"
            ) from in_subfolder


def new_unet(
    config: str, vae: VAE, cross_attention_dim: int, resolution: int, qk_init_scale: float = 1.0
) -> UNet2DConditionModel:
    """Make an untrained UNet that fits a VAE and a conditioner.

    Args:
        config: Config of a UNet: a JSON file, or a folder or repository that has one. Its latent channels, latent
            size and token width are replaced by the fitting ones.
        vae: The autoencoder.
        cross_attention_dim: Width of the conditioner's tokens.
        resolution: Side of the training images in pixels.
        qk_init_scale: Factor of the initial query and key weights. At small width and short training attention stays
            uniform with diffusers' initialisation; 2 lets it start to choose.
    """
    settings = dict(UNet2DConditionModel.load_config(config))
    settings.update(
        in_channels=vae.config["latent_channels"],
        out_channels=vae.config["latent_channels"],
        sample_size=resolution // vae_scale_factor(vae),
        cross_attention_dim=cross_attention_dim,
    )
    unet = UNet2DConditionModel.from_config(settings)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, Attention) and qk_init_scale != 1:
                module.to_q.weight.mul_(qk_init_scale)
                module.to_k.weight.mul_(qk_init_scale)
    return unet


def make_scheduler(
    config: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool = False,
    flow_shift: float | None = None,
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise schedule of training, as the sampler that is saved with the pipeline.

    Args:
        config: A scheduler's config (JSON file or folder), or a folder or repository of a pipeline that has one;
            Stable Diffusion's by default.
        prediction_type: `"epsilon"`, `"v_prediction"`, `"sample"`, or `"flow_prediction"` for flow matching; in place
            of the config's.
        zero_snr: Rescale the schedule to end at pure noise and sample from there (Lin et al. 2023).
        flow_shift: Of flow matching, in place of the config's: above 1 for large images, 3 in Stable Diffusion 3.

    Raises:
        ValueError: If zero terminal SNR is combined with predicting the noise, which is then all there is to see, or
            with flow matching, or `flow_shift` is not positive or given without flow matching.
    """
    settings = dict(STABLE_DIFFUSION_SCHEDULE)
    if config is not None:
        try:
            settings = dict(
                DDIMScheduler.load_config(config, subfolder=None if Path(config).is_file() else "scheduler")
            )
        except OSError:
            settings = dict(DDIMScheduler.load_config(config))
    was_flow = settings.get("_class_name", "").startswith("FlowMatch") or bool(settings.get("use_flow_sigmas"))
    if was_flow if prediction_type is None else prediction_type == "flow_prediction":
        if zero_snr:
            raise ValueError("Flow matching ends at pure noise by itself: leave zero terminal SNR out.")
        shift = settings.get("shift", settings.get("flow_shift", 1.0)) if flow_shift is None else flow_shift
        if shift <= 0:
            raise ValueError(f"The shift of a flow must be positive, got {shift}.")
        return FlowMatchEulerDiscreteScheduler(settings.get("num_train_timesteps", 1000), shift=shift)
    if flow_shift is not None:
        raise ValueError("A shift is for flow matching: give it with flow_prediction.")
    if prediction_type is not None:
        settings["prediction_type"] = prediction_type
    if zero_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler.from_config(settings)
    if scheduler.config["rescale_betas_zero_snr"] and scheduler.config["prediction_type"] == "epsilon":
        raise ValueError(
            "A schedule that ends at zero SNR cannot be trained by predicting the noise. Use v_prediction."
        )
    return scheduler


def latent_shape(vae: VAE, unet: UNet2DConditionModel, resolution: int) -> tuple[int, int, int]:
    """Shape `(L, h, w)` of the latents of square images.

    Raises:
        ValueError: If the VAE and the UNet cannot halve the image as often as they do.
    """
    factor = vae_scale_factor(vae)
    multiple = factor * 2 ** (len(unet.config["block_out_channels"]) - 1)
    if resolution % multiple:
        raise ValueError(f"The resolution must be a multiple of {multiple} for this VAE and UNet, got {resolution}.")
    return vae.config["latent_channels"], resolution // factor, resolution // factor


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float | None = None) -> None:
    """Freeze a UNet and add a trainable low-rank adapter to its attention, in place (Hu et al. 2021).

    The scale of the adapter is alpha / rank, by default 1. ImportError if peft is not installed.
    """
    peft = require("peft", "train", "A LoRA needs peft")
    unet.requires_grad_(False)
    unet.add_adapter(
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
    )


def add_fusion(pipe: DinoDiffusionPipeline, encoder_dropout: float | None = None) -> None:
    """Give a pipeline a `TokenFusion` to train, unless it has one, and note how often encoders are to be left out.

    By default that stays as it was, and is 0 for a new one. A ValueError if the conditioner has only one encoder.
    """
    if pipe.fusion is None:
        if len(pipe.conditioner.encoder_names) < 2:
            raise ValueError(
                f"Fusion is for several encoders, and the conditioner has one ({pipe.conditioner.encoder_names[0]})."
            )
        pipe.register_modules(fusion=TokenFusion.of(pipe.conditioner, encoder_dropout or 0.0))
    elif encoder_dropout is not None:
        check_dropout(encoder_dropout)
        pipe.fusion.register_to_config(encoder_dropout=encoder_dropout)


def frozen_dtype(mixed_precision: str) -> torch.dtype:
    """What frozen weights are kept in under accelerate's mixed precision: `"no"`, `"fp16"` or `"bf16"`."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def adapt_for_training(
    pipe: DinoDiffusionPipeline,
    device: torch.device,
    frozen_dtype: torch.dtype = torch.float32,
    frozen_device: torch.device | str | None = None,
) -> list[nn.Parameter]:
    """Move a pipeline to where it is trained: frozen weights in `frozen_dtype`, trained ones in float32.

    Its VAE is frozen here; the weights of the UNet, and of the fusion if there is one, that require gradients are the
    trained ones, which are returned. VAE and conditioner stay on `frozen_device`, see `on_device`; by default where
    training is.
    """
    for model in (pipe.vae.requires_grad_(False), pipe.conditioner):
        # diffusers' own `to` warns of layers that this one handles too
        nn.Module.to(model, frozen_device or device, frozen_dtype)
    trained = [pipe.unet, *([] if pipe.fusion is None else [pipe.fusion])]
    parameters = [parameter for model in trained for parameter in model.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.to(device, torch.float32 if parameter.requires_grad else frozen_dtype)
    for model in trained:
        model.to(device).train()
    note_condition(pipe.unet, pipe.conditioner)
    pipe.set_progress_bar_config(disable=True)
    return [parameter for parameter in parameters if parameter.requires_grad]


@contextmanager
def on_device(models: Sequence[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Inside, the models are on a device, such as the one where others are trained; afterwards where they were."""
    places = [next(model.parameters()).device for model in models]
    for model in models:
        nn.Module.to(model, device)
    try:
        yield
    finally:
        for model, place in zip(models, places, strict=True):
            nn.Module.to(model, place)


def enable_xformers(unet: UNet2DConditionModel) -> None:
    """Use xformers' attention in place of PyTorch's; ImportError names the extra if it is not installed."""
    require("xformers", "xformers", "This attention needs xformers")
    unet.enable_xformers_memory_efficient_attention()
