r"""Train the denoiser of a DinoDiffusionPipeline from unlabelled images (DiNO-Diffusion, arXiv 2407.11594).

    accelerate launch examples/train_dino.py examples/configs/paper_dinov1.yaml \
        --train_data_dir /data/cxr --validation_data_dir /data/cxr-unseen

Autoencoder and DINO encoder stay frozen. `--output_dir` becomes a pipeline, or with `--rank` a LoRA for one.
"""

from __future__ import annotations

if __name__ == "__main__":
    import diffusers_dino.cli.early  # noqa: F401  (first: signals and readers that leave are minded from here on)

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from diffusers_dino import DinoDiffusionPipeline, data
from diffusers_dino.cli import training_flags
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.run import Run, open_run
from diffusers_dino.denoisers import family_of
from diffusers_dino.fingerprints import fingerprint_model, hash_of, own_config
from diffusers_dino.fusion import fuse
from diffusers_dino.pipelines.compilation import compile_models
from diffusers_dino.pipelines.preparation import note_preparation
from diffusers_dino.schedules import is_flow
from diffusers_dino.training import models, objective, optim, validation
from diffusers_dino.training.features import FeatureEncoder, Views, cache_in_memory, fit_familiarity
from diffusers_dino.training.perceptual import token_loss
from diffusers_dino.training.run_folder import put_result
from diffusers_dino.training.state import TrainingState
from diffusers_dino.training.tally import Tally

logger = logging.getLogger("train_dino")


@dataclass
class Arguments(training_flags.SharingArguments, training_flags.RunArguments, training_flags.FeatureArguments):
    """Flags of images, views and frozen models, then those of the run, then these; a repeated one sets its default."""

    learning_rate: float = flag(1e-4, "After warm-up.")
    lr_scheduler: str = flag("constant_with_warmup", "One of diffusers', such as constant, cosine, linear.")
    lr_warmup_steps: int = flag(500, "Updates of warm-up.")
    adam_beta2: float = flag(0.999, "Second moment's decay.")
    adam_weight_decay: float = flag(1e-2, "Weight decay.")
    output_dir: str = flag("dino-diffusion", "Where pipeline, checkpoints, pictures and log go.", group="Output")
    unet: str | None = flag(None, "UNet, in place of the pretrained model's.", group="Denoiser and noise schedule")
    unet_config: str | None = flag(None, "Train a new UNet of this config (JSON file, folder or Hub id).")
    transformer: str | None = flag(None, "Transformer, in place of the pretrained model's denoiser.")
    transformer_config: str | None = flag(None, "Train a new transformer of this config, its class in _class_name.")
    qk_init_scale: float = flag(1.0, "Factor of a new denoiser's query and key weights.")
    scheduler: str | None = flag(None, "Config of the noise schedule, in place of Stable Diffusion's.")
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None = flag(
        None, "In place of the schedule's; flow_prediction is flow matching."
    )
    flow_times: Literal["logit_normal", "uniform"] | None = flag(None, "Flow matching's times; by default the first.")
    flow_shift: float | None = flag(None, "Shift of flow matching's times towards noise: above 1 for large images.")
    rescale_betas_zero_snr: bool = flag(False, "End the schedule at pure noise; needs v_prediction.")
    rank: int | None = flag(None, "Train a LoRA of this rank on --pretrained_pipeline.")
    lora_alpha: float | None = flag(None, "Scale of the LoRA; the rank by default.")
    condition_dropout: float = flag(0.1, "Share of samples with the null condition, for guidance.", group="Objective")
    fuse_encoders: bool = flag(False, "Learn an embedding for each of several encoders, added to its tokens.")
    encoder_dropout: float | None = flag(None, "Leave encoders out at random, so that any of them will do later.")
    snr_gamma: float | None = flag(None, "Min-SNR weighting of the loss; 5.0 is its authors' choice.")
    token_weight: float = flag(0.0, "Weight of the error of the predicted images' tokens: for images true to theirs.")
    token_guidance: float = flag(2.0, "Guidance under which the images of --token_weight are predicted; 1 for none.")
    noise_offset: float = flag(0.0, "Strength of noise that is constant over a channel.")
    scale_lr: bool = flag(False, "Scale the learning rate by the images per update.", group="More of the optimisation")
    use_8bit_adam: bool = flag(False, "bitsandbytes' AdamW.")
    adam_epsilon: float = flag(1e-8, "Epsilon of Adam.")
    use_ema: bool = flag(False, "Average the weights; samples and the final pipeline use the average.")
    ema_decay: float = flag(0.9999, "Decay of the average.")
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere and later.", group="Speed and memory")
    gradient_checkpointing: bool = flag(False, "Save memory, compute activations twice.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "xformers in place of PyTorch's attention.")
    torch_compile: bool = flag(False, "Compile the denoiser, and what encodes uncached images; channels-last, too.")
    compile_regions: Literal["auto", "blocks", "whole"] = flag("auto", "What to compile; auto goes by the size.")
    compile_mode: str | None = flag(None, "torch.compile's, such as reduce-overhead for a small model on a GPU.")
    channels_last: bool = flag(False, "Channels-last memory format of denoiser and VAE, also uncompiled.")
    exchange_steps: int | None = flag(None, "Most updates between looks at losses and signals; 10 on a GPU, else 1.")
    validation_data_dir: str | None = flag(
        None, "Unseen images; else a share of the others is held out for --metric_steps.", group="Validation"
    )
    validation_steps: int = flag(500, "Updates between pictures of variations; 0 draws none.")
    num_validation_images: int = flag(4, "Sources in a picture.")
    num_validation_variations: int = flag(3, "Variations of each source.")
    validation_inference_steps: int = flag(25, "Sampling steps.")
    validation_guidance_scale: float = flag(2.0, "Guidance in the pictures.")
    metric: Literal["frechet", "kernel"] = flag("frechet", "Distance that chooses the best weights.")
    metric_features: str = flag("pixels", "Feature extractor of the metric, such as tiny, xrv or dinov2.")
    metric_weights: str | None = flag(None, "Its weights: a local file or folder.")
    metric_steps: int = flag(0, "Updates between measurements on unseen images; 0 measures nothing.")
    metric_num_images: int = flag(256, "Images to generate for a measurement.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    check_arguments(args)
    with open_run(args, logger, tracker=args.report_to) as run:
        run_training(args, run)


def run_training(args: Arguments, run: Run) -> None:
    """From the images and models that the flags name to a pipeline in `--output_dir`."""
    accelerator = run.accelerator
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    images = training_flags.open_training_images(args, args.pretrained_pipeline, may_differ=args.rank is None)
    images, unseen = training_flags.split_off_unseen(args, images, args.metric_num_images if args.metric_steps else 0)
    views = data.TrainingViews(images, training_flags.make_augmentation(args), args.seed)
    with accelerator.main_process_first():  # one process downloads
        pipe = build_pipeline(args, views.images, accelerator.device)
    models.latent_shape(pipe.vae, pipe.denoiser, args.resolution)  # checks the resolution
    check_objective(args, pipe)
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(pipe.denoiser)
    metric = validation.open_metric(args.metric, args.metric_features, args.metric_weights, accelerator.device)
    if args.feature_cache:
        views = run.open_cache(views, pipe.vae, pipe.conditioner, args.cache_views)
    encoders = models.describe_encoders(pipe.conditioner)
    run.begin(images, use_8bit_adam=args.use_8bit_adam, models=describe_models(args, pipe), encoders=encoders)
    if accelerator.is_main_process and not args.rank:
        models.save_frozen(pipe, args.output_dir)
    cached = bool(args.feature_cache or args.cache_views)
    at_rest = "cpu" if cached and not args.token_weight else None
    dtype = models.frozen_dtype(accelerator.mixed_precision)
    trainable = models.adapt_for_training(pipe, accelerator.device, dtype, at_rest)
    if args.channels_last or args.torch_compile:
        pipe.denoiser.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    encode = FeatureEncoder(pipe.vae, pipe.conditioner, accelerator.device)
    if args.cache_views and not args.feature_cache:
        with models.on_device((pipe.vae, pipe.conditioner), accelerator.device):
            views = cache_in_memory(views, encode, args.cache_views, args.cache_batch_size, accelerator)
    if args.gradient_checkpointing:
        pipe.denoiser.enable_gradient_checkpointing()
    total_steps = run.count_updates(len(views))
    optimizer = optim.make_adamw(
        trainable,
        lr=args.learning_rate * (run.images_per_update if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        eight_bit=args.use_8bit_adam,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=total_steps
    )
    state = TrainingState(
        accelerator,
        pipe.denoiser,
        optimizer,
        lr_scheduler,
        ema_decay=args.ema_decay if args.use_ema else None,
        lora=args.rank is not None,
        folder=family_of(pipe.denoiser).component,
        fusion=pipe.fusion,
    )
    if args.torch_compile:
        compile_for_training(args, pipe, cached)
    run.open_trackers()
    logger.info(
        f"Training {sum(p.numel() for p in trainable) / 1e6:.2f} M weights on {len(views)} images: {total_steps} "
        f"steps of {accelerator.num_processes} x {args.train_batch_size} x {args.gradient_accumulation_steps}"
    )
    validator = make_validator(args, pipe, state, unseen, metric)
    step = train(args, run, pipe, views, encode, state, validator, total_steps)
    if step < total_steps:
        run.say_stopped(step)
    elif accelerator.is_main_process:
        save_result(args, run, pipe, state, step, views)
    accelerator.end_training()


def train(
    args: Arguments,
    run: Run,
    pipe: DinoDiffusionPipeline,
    views: Views,
    encode: FeatureEncoder,
    state: TrainingState,
    validator: validation.Validator,
    total_steps: int,
) -> int:
    """The loop. Returns the number of updates done, less than `total_steps` if a signal asked to stop."""
    accelerator, trainable = state.accelerator, list(state.trainable.values())
    step, position = run.resume(state)  # updates of the weights, and images that they were made from
    batches = run.load_batches(views, position, encode)
    progress = run.open_progress(step, total_steps)
    if run.unseen and validator.is_due(step):  # a kill came between the checkpoint and its validation
        validator.run(step, progress.say)
        run.note_validated(step)
    tally = Tally(accelerator, state.optimizer, run.interruption, args.exchange_steps)
    while step < total_steps and not tally.stop:
        loss_sum = torch.zeros((), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            with accelerator.accumulate(state.model, state.fusion):
                loss = compute_loss(args, pipe, state.model, encode, batch, state.fusion)
                accelerator.backward(loss)
                loss_sum += loss.detach() / args.gradient_accumulation_steps
        step, position = step + 1, position + run.images_per_update
        norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
        lr = state.lr_scheduler.get_last_lr()[0]
        is_checkpoint = args.checkpointing_steps > 0 and step % args.checkpointing_steps == 0
        at_once = is_checkpoint or validator.is_due(step) or step == total_steps
        known = tally.note(step, loss_sum, norm, lr, batch["key"], at_once)  # refuses what is not finite
        state.optimizer.step()
        state.lr_scheduler.step()
        state.optimizer.zero_grad()
        state.update_average()
        for update in known:
            progress.update(update.loss, update.lr)
            accelerator.log({"loss": update.loss, "lr": update.lr}, step=update.step)
        if tally.stop or tally.save or is_checkpoint:
            run.save(state, step, position)
        validator.run(step, progress.say)
        run.note_validated(step)
    progress.close()
    return step


def compute_loss(
    args: Arguments,
    pipe: DinoDiffusionPipeline,
    model: torch.nn.Module,
    encode: FeatureEncoder,
    batch: dict[str, Any],
    fusion: torch.nn.Module | None = None,
) -> Tensor:
    """The weighted squared error of what `model`, the denoiser, predicts for a batch, and of its tokens: a scalar."""

    def predict(noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return family_of(pipe.denoiser).predict(model, noisy, timesteps, fuse(fusion, tokens))

    scheduler = pipe.scheduler
    mean, std, wanted = encode(batch)
    draws = objective.draw_for_training(
        batch["position"],
        latent_shape=mean.shape[1:],
        num_train_timesteps=scheduler.config["num_train_timesteps"],
        seed=args.seed,
        noise_offset=args.noise_offset,
    ).to(mean.device)
    latents = mean + std * draws.latent_noise
    tokens, null_tokens = wanted, pipe.conditioner.null_condition(1)
    if pipe.fusion is not None:
        tokens = objective.drop_encoders(tokens, null_tokens, batch["position"], pipe.fusion, args.seed)
    tokens = objective.drop_condition(tokens, null_tokens, draws.drop, args.condition_dropout)
    noisy, timesteps = objective.noisy_latents(scheduler, latents, draws, args.flow_times or "logit_normal")
    prediction = predict(noisy, timesteps, tokens)
    target = objective.prediction_target(scheduler, latents, draws.noise, timesteps)
    weights = None
    if args.snr_gamma is not None:
        alphas_cumprod = scheduler.alphas_cumprod[draws.timesteps]
        weights = objective.min_snr_weights(alphas_cumprod, args.snr_gamma, scheduler.config["prediction_type"])
    loss = objective.weighted_mse(prediction, target, weights)
    if args.token_weight:
        told = draws.drop >= args.condition_dropout
        unfaithful = token_loss(pipe, predict, prediction, noisy, timesteps, wanted, told, args.token_guidance)
        loss = loss + args.token_weight * unfaithful
    return loss


def check_arguments(args: Arguments) -> None:
    training_flags.check_frozen_models(args)
    training_flags.check_lora(args)
    if args.rank and not args.pretrained_pipeline:
        raise ValueError("A LoRA (--rank) is trained on a whole pipeline: give --pretrained_pipeline.")
    if args.rank and args.fuse_encoders:
        raise ValueError("A LoRA (--rank) keeps its pipeline's fusion as it is: leave --fuse_encoders out.")
    if min(args.token_weight, args.token_guidance) < 0:
        raise ValueError("--token_weight and --token_guidance must not be negative.")
    if args.token_weight and args.token_guidance != 1 and not args.condition_dropout:
        raise ValueError("Without --condition_dropout there is no guidance: give --token_guidance 1.")
    if args.encoder_dropout is not None and not args.fuse_encoders:
        raise ValueError("--encoder_dropout needs what tells the encoders apart: give it with --fuse_encoders.")
    named = [name for name in ("unet", "unet_config", "transformer", "transformer_config") if getattr(args, name)]
    if len(named) > 1:
        raise ValueError(f"There is one denoiser to train: give --{named[0]} or --{named[1]}.")


def check_objective(args: Arguments, pipe: DinoDiffusionPipeline) -> None:
    if is_flow(pipe.scheduler) and args.snr_gamma is not None:
        raise ValueError("Flow matching weighs its loss by --flow_times: leave --snr_gamma out.")
    if args.flow_times and not is_flow(pipe.scheduler):
        raise ValueError("--flow_times is for flow matching: give it with --prediction_type flow_prediction.")


def build_pipeline(args: Arguments, images: data.ImageDataset, device: torch.device) -> DinoDiffusionPipeline:
    if args.pretrained_pipeline:
        pipe = DinoDiffusionPipeline.from_pretrained(  # guiding is for who samples
            args.pretrained_pipeline, guider=None, guide=None, revision=args.revision, variant=args.variant
        )
    else:
        vae, conditioner = training_flags.load_frozen(args, images, device)
        pipe = models.build_pipeline(
            vae,
            conditioner,
            resolution=args.resolution,
            base=args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            denoiser=args.transformer or args.unet,
            denoiser_config=args.transformer_config or args.unet_config,
            qk_init_scale=args.qk_init_scale,
            scheduler=args.scheduler,
            prediction_type=args.prediction_type,
            zero_snr=args.rescale_betas_zero_snr,
            flow_shift=args.flow_shift,
        )
    if args.fuse_encoders:
        models.add_fusion(pipe, args.encoder_dropout)
    if args.rank:
        models.add_lora(pipe.denoiser, args.rank, args.lora_alpha)
        if pipe.fusion is not None:
            pipe.fusion.requires_grad_(False)
    else:
        note_preparation(pipe.denoiser, images.preprocessing, pipe.vae.config["in_channels"])
    return pipe


def compile_for_training(args: Arguments, pipe: DinoDiffusionPipeline, cached: bool) -> None:
    """Compile the denoiser, and what encodes images unless their features are cached."""
    whole = {"auto": None, "blocks": False, "whole": True}[args.compile_regions]
    if compile_models(pipe.denoiser, whole=whole, mode=args.compile_mode) and not cached:
        compile_models(pipe.vae.encoder, pipe.conditioner, whole=whole, dynamic=False)


def make_validator(
    args: Arguments,
    pipe: DinoDiffusionPipeline,
    state: TrainingState,
    images: data.ImageDataset,
    metric: validation.FeatureMetric,
) -> validation.Validator:
    return validation.Validator(
        pipe,
        state,
        args.output_dir,
        images,
        metric=metric,
        grid_steps=args.validation_steps,
        num_sources=args.num_validation_images,
        num_variations=args.num_validation_variations,
        metric_steps=args.metric_steps,
        num_metric_images=args.metric_num_images,
        batch_size=args.train_batch_size,
        seed=args.seed,
        guidance_scale=args.validation_guidance_scale,
        num_inference_steps=args.validation_inference_steps,
    )


def describe_models(args: Arguments, pipe: DinoDiffusionPipeline) -> dict[str, Any]:
    """What a run cannot change when it goes on; call it before the models are cast."""
    begun = [p for p in pipe.denoiser.parameters() if not (args.rank and p.requires_grad)]
    new = {"config": own_config(pipe.denoiser), "qk_init_scale": args.qk_init_scale}
    component = family_of(pipe.denoiser).component
    same = f"standardised by {args.normalize_tokens} images"  # the last bits depend on the device: see `encoders`
    return {
        "vae": fingerprint_model(pipe.vae),
        "conditioner": same if args.normalize_tokens else fingerprint_model(pipe.conditioner),
        f"{component} at the start": new if args.transformer_config or args.unet_config else hash_of(*begun)[:16],
        "fusion at the start": None if pipe.fusion is None else fingerprint_model(pipe.fusion),
        "noise schedule": own_config(pipe.scheduler),
        "lora_alpha": args.rank and (args.lora_alpha or args.rank),
    }


def save_result(
    args: Arguments, run: Run, pipe: DinoDiffusionPipeline, state: TrainingState, num_updates: int, views: Views
) -> None:
    def write(folder: Path) -> None:
        state.save_for_use(folder)
        if args.rank:
            return
        if fit_familiarity(pipe.conditioner, views, state.accelerator.device, training_flags.patients_of):
            pipe.conditioner.token_statistics.save(folder / "conditioner")
        pipe.save_config(folder)  # model_index.json makes the folder a pipeline

    put_result(Path(args.output_dir), write)
    bases = [args.pretrained_pipeline, args.pretrained_model_name_or_path, args.unet or args.transformer]
    bases += [args.vae, args.conditioner, *(args.encoder or [])]
    run.write_card(len(views), num_updates, bases)
    logger.info(f"The result is in {args.output_dir}")


if __name__ == "__main__":
    main()
