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
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.attention_processor import Attention
from torch import nn

from ..conditioner import DinoImageConditioner
from ..denoisers import FAMILIES, family_named, family_of, with_lora_methods
from ..extras import require
from ..files import save_atomically
from ..fingerprints import hash_of
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
    "describe_encoders",
    "enable_xformers",
    "frozen_dtype",
    "latent_shape",
    "load_denoiser",
    "load_trained_pipeline",
    "load_vae",
    "make_scheduler",
    "new_denoiser",
    "on_device",
    "save_frozen",
]

_COMPONENTS = tuple(dict.fromkeys(family.component for family in FAMILIES))

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
    denoiser: str | None = None,
    denoiser_config: str | None = None,
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
        denoiser: Folder or repository of a UNet or transformer.
        denoiser_config: Make a new one of this config, with `qk_init_scale`, by `new_denoiser`.
        scheduler: Config for `make_scheduler`, as are `prediction_type`, `zero_snr` and `flow_shift`. Where nothing
            says what to predict, a new transformer that its authors trained by flow matching is, too.
        hub: `revision`, `variant` and the like for `base`.

    Raises:
        ValueError: If there is no denoiser, or the parts do not fit together.
    """
    if not (denoiser or denoiser_config or base):
        raise ValueError(
            "There is no UNet and no transformer: give one, the config of a new one, or a pretrained model."
        )
    if denoiser_config:
        model = new_denoiser(denoiser_config, vae, conditioner.token_dim, resolution, qk_init_scale)
    else:
        model = load_denoiser(denoiser) if denoiser else load_denoiser(base, **hub)
    family = family_of(model)
    if denoiser_config and family.flow and not (scheduler or base or zero_snr):
        prediction_type = prediction_type or "flow_prediction"
    schedule = make_scheduler(scheduler or base, prediction_type, zero_snr, flow_shift)
    return DinoDiffusionPipeline(
        vae=vae,
        conditioner=conditioner,
        scheduler=schedule,
        flow_matching=is_flow(schedule),
        **{family.component: model},
    )


def load_trained_pipeline(name_or_path: str | Path, dtype: torch.dtype | None = None) -> DinoDiffusionPipeline:
    """Load a pipeline's folder or repository, or `RUN/checkpoint-500` (or `best`), whose other parts lie in `RUN`.

    If the run averaged its weights, `unet/` or `transformer/` of a checkpoint holds the average, which is loaded. A
    LoRA is fused into the weights of the pipeline that it was trained on. FileNotFoundError if a part is missing.
    """
    folder, options = Path(name_or_path), {} if dtype is None else {"dtype": dtype}
    run = folder.resolve().parent
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return DinoDiffusionPipeline.from_pretrained(str(name_or_path), **options)
    if (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        told = json.loads((run / "training_arguments.json").read_text())
        options |= {name: told.get(name) for name in ("revision", "variant")}
        pipe = DinoDiffusionPipeline.from_pretrained(told["pretrained_pipeline"], **options)
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe
    if not any((folder / name).is_dir() for name in _COMPONENTS) or not (run / "conditioner").is_dir():
        raise FileNotFoundError(
            f"{name_or_path} is not a pipeline (it has no model_index.json) and not a checkpoint of a training run "
            "(unet/ or transformer/ in it, and conditioner/ beside it)."
        )
    denoiser = load_denoiser(str(folder))
    pipe = DinoDiffusionPipeline(
        vae=load_vae(str(run)),
        conditioner=DinoImageConditioner.from_pretrained(run, subfolder="conditioner"),
        scheduler=make_scheduler(str(run)),
        **{family_of(denoiser).component: denoiser},
        fusion=TokenFusion.from_pretrained(folder, subfolder="fusion") if (folder / "fusion").is_dir() else None,
    )
    check_condition(denoiser, pipe.conditioner, name_or_path)
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


def load_denoiser(name_or_path: str, **hub: Any) -> ModelMixin:
    """Load a denoiser from its own folder or repository, or from the `unet` or `transformer` of a pipeline.

    ValueError if it is of a class that is not in `diffusers_dino.denoisers`.
    """
    model = _load(name_or_path, *_COMPONENTS, **hub)
    try:
        family_of(model)
    except ValueError as error:
        raise ValueError(f"{name_or_path!r}: {error}") from None
    return model


def _load(name_or_path: str, *subfolders: str, **hub: Any) -> torch.nn.Module:
    """Load a model from where its config is: the place itself, or a subfolder that a pipeline keeps it in."""
    folder, hub = Path(name_or_path), {"use_safetensors": True, **hub}
    if folder.is_dir():
        for subfolder in (None, *subfolders):
            if Path(folder, subfolder or "", "config.json").is_file():
                return AutoModel.from_pretrained(name_or_path, subfolder=subfolder, **hub)
        places = " nor in ".join(str(folder / subfolder) for subfolder in subfolders)
        raise FileNotFoundError(f"There is no config.json in {folder} nor in {places}.")
    failures = []
    for subfolder in (*subfolders, None):
        try:
            return AutoModel.from_pretrained(name_or_path, subfolder=subfolder, **hub)
        except (OSError, ValueError) as error:
            failures.append(error)
    raise FileNotFoundError(
        f"{name_or_path!r} is not a folder, and the Hub gave no {' and no '.join(subfolders)} for it: {failures[-1]}"
    ) from failures[0]


def new_denoiser(config: str, vae: VAE, token_width: int, resolution: int, qk_init_scale: float = 1.0) -> ModelMixin:
    """Make an untrained UNet or transformer that fits a VAE and a conditioner.

    Args:
        config: Its config: a JSON file, or a folder or repository that has one. `_class_name` says of which class of
            diffusers. Its latent channels, latent size and token width are replaced by the fitting ones.
        vae: The autoencoder.
        token_width: Width of the conditioner's tokens.
        resolution: Side of the training images in pixels.
        qk_init_scale: Factor of the initial query and key weights. At small width and short training attention stays
            uniform with diffusers' initialisation; 2 lets it start to choose.
    """
    settings = dict(UNet2DConditionModel.load_config(config))  # of whatever class
    family = family_named(settings.get("_class_name", UNet2DConditionModel.__name__))
    side = resolution // vae_scale_factor(vae)
    model = family.kind.from_config(family.fit(settings, vae.config["latent_channels"], side, token_width))
    family.initialise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention) and qk_init_scale != 1:
                module.to_q.weight.mul_(qk_init_scale)
                module.to_k.weight.mul_(qk_init_scale)
    return model


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


def latent_shape(vae: VAE, denoiser: ModelMixin, resolution: int) -> tuple[int, int, int]:
    """Shape `(L, h, w)` of the latents of square images.

    Raises:
        ValueError: If the VAE and the UNet cannot halve the image as often as they do, or a transformer cannot cut the
            latents into its patches, or has no positions for so many.
    """
    factor, family = vae_scale_factor(vae), family_of(denoiser)
    multiple = factor * family.training_multiple(denoiser.config)
    if resolution % multiple:
        raise ValueError(
            f"The resolution must be a multiple of {multiple} for this VAE and {family.title}, got {resolution}."
        )
    side = resolution // factor
    family.check_size(denoiser.config, side, side)
    return vae.config["latent_channels"], side, side


def describe_encoders(conditioner: DinoImageConditioner) -> dict[str, Any]:
    """What condition tokens are made by, apart from statistics that standardise them."""
    chosen = {name: conditioner.config[name] for name in ("tokens", "projection_dim")}
    return {"weights": [hash_of(*encoder.parameters())[:16] for encoder in conditioner.image_encoders], **chosen}


def add_lora(denoiser: ModelMixin, rank: int, alpha: float | None = None) -> None:
    """Freeze a denoiser and add a trainable low-rank adapter to its attention, in place (Hu et al. 2021).

    The scale of the adapter is alpha / rank, by default 1. ImportError if peft is not installed.
    """
    peft = require("peft", "train", "A LoRA needs peft")
    with_lora_methods(denoiser)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            init_lora_weights="gaussian",
            target_modules=list(family_of(denoiser).lora_targets),
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


def save_frozen(pipe: DinoDiffusionPipeline, output_dir: str | Path) -> None:
    """Write the parts that training does not change, unless they are there; call it before their weights are cast."""
    for name in ("vae", "conditioner", "scheduler"):
        if not Path(output_dir, name).exists():
            with save_atomically(Path(output_dir, name)) as folder:
                getattr(pipe, name).save_pretrained(folder)


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

    Its VAE is frozen here; the weights of the denoiser, and of a fusion if there is one, that require gradients are
    the trained ones, which are returned. VAE and conditioner stay on `frozen_device`, see `on_device`; by default
    where training is.
    """
    for model in (pipe.vae.requires_grad_(False), pipe.conditioner):
        # diffusers' own `to` warns of layers that this one handles too
        nn.Module.to(model, frozen_device or device, frozen_dtype)
    trained = [pipe.denoiser, *([] if pipe.fusion is None else [pipe.fusion])]
    parameters = [parameter for model in trained for parameter in model.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.to(device, torch.float32 if parameter.requires_grad else frozen_dtype)
    for model in trained:
        model.to(device).train()
    note_condition(pipe.denoiser, pipe.conditioner)
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


def enable_xformers(denoiser: ModelMixin) -> None:
    """Use xformers' attention in place of PyTorch's; ImportError names the extra if it is not installed."""
    require("xformers", "xformers", "This attention needs xformers")
    denoiser.enable_xformers_memory_efficient_attention()
