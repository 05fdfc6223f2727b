"""Train the autoencoder of a latent diffusion model from unlabelled images, for sites that have nothing else.

    accelerate launch examples/train_vae.py examples/configs/tiny_vae.yaml --train_data_dir /data/cxr

`--output_dir` becomes an `AutoencoderKL` with the statistics of its latents in its config; `reconstructions.png` shows
images that were held out | their reconstructions.
"""

from __future__ import annotations

if __name__ == "__main__":
    import diffusers_dino.cli.early  # noqa: F401  (first: signals and readers that leave are minded from here on)

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffusers_dino import DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.run import Run, open_run
from diffusers_dino.cli.training_flags import (
    AugmentationArguments,
    ImageArguments,
    RunArguments,
    make_augmentation,
    open_training_images,
    split_off_unseen,
)
from diffusers_dino.cli.training_run import TrainingRun
from diffusers_dino.data import ImageDataset, TrainingViews, collate
from diffusers_dino.fingerprints import fingerprint_model, own_config
from diffusers_dino.latents import shift_and_scale, vae_scale_factor
from diffusers_dino.pixels import unit_to_vae, vae_to_unit
from diffusers_dino.seeds import generator_for
from diffusers_dino.sheets import contact_sheet
from diffusers_dino.training.adversarial import Adversary, PatchDiscriminator
from diffusers_dino.training.autoencoder import ReconstructionLoss, latent_statistics, psnr
from diffusers_dino.training.perceptual import perceptual_distance
from diffusers_dino.training.run_folder import put_result

logger = logging.getLogger("train_vae")

ARCHITECTURE = ("in_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
ARCHITECTURE += ("mid_block_add_attention",)


@dataclass
class Arguments(RunArguments, AugmentationArguments, ImageArguments):
    sharpness: float = flag(0.0, "Largest weight of the random unsharp mask.")
    crop_size: int | None = flag(
        None, "Train on one random crop of this side of each view: cheaper than whole images."
    )
    vae: str | None = flag(None, "AutoencoderKL to continue from, in place of a new one.", group="Model")
    freeze_encoder: bool = flag(
        False, "Train only the decoder of --vae: latents, and what was trained on them, stay as they are."
    )
    in_channels: Literal[1, 3] = flag(1, "Channels of the images: 1 for radiographs.")
    block_out_channels: list[int] = flag(
        [64, 128, 128], "Channels per level; each level but the last halves the side."
    )
    layers_per_block: int = flag(1, "Residual blocks per level.")
    latent_channels: int = flag(4, "Channels of the latents.")
    norm_num_groups: int = flag(32, "Groups of the normalisation; divides all channels.")
    mid_block_add_attention: bool = flag(False, "Attention at the lowest level.")
    channels_last: bool = flag(True, "Channels-last memory format: faster on most devices.")
    latent_noise: float = flag(
        0.0, "Largest standard deviation of noise on latents, in units of theirs: for decoders of sampled latents."
    )
    l1_weight: float = flag(1.0, "Weight of the absolute error.", group="Objective")
    mse_weight: float = flag(2.0, "Weight of the squared error.")
    gradient_weight: float = flag(0.5, "Weight of the absolute error of the image's gradients.")
    kl_weight: float = flag(1e-4, "Weight of the divergence of the latents from the unit Gaussian, per element.")
    adversarial_weight: float = flag(
        0.0, "Weight of a patch discriminator, relative to the errors' gradient; 0 for none, 1 for sharp textures."
    )
    adversarial_learning_rate: float = flag(2e-4, "Learning rate of the discriminator.")
    perceptual_encoder: str | None = flag(
        None, "DINO encoder whose tokens are to be alike, too: Hub id or folder in transformers' or timm's format."
    )
    perceptual_size: int | None = flag(None, "Side in pixels that it sees crops at; its own by default.")
    perceptual_weight: float | None = flag(1.0, "Weight of one minus the cosine of its tokens.")
    validation_data_dir: str | None = flag(
        None, "Unseen images; else some of --train_data_dir are held out.", group="Validation"
    )
    num_validation_images: int = flag(16, "Images to reconstruct; patients are held out whole.")
    validation_steps: int = flag(500, "Updates between validations; 0 validates only at the end.")
    num_statistics_images: int = flag(1024, "Training images that the statistics of the latents are taken from.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    with open_run(args, logger) as run:
        train(args, run)


def train(args: Arguments, opened: Run) -> None:
    accelerator = opened.accelerator
    images, held_out = split_images(args, open_training_images(args))
    vae = make_vae(args)
    check_crops(args, vae)
    loss_function = ReconstructionLoss(args.l1_weight, args.mse_weight, args.gradient_weight, args.kl_weight)
    views = TrainingViews(images, make_augmentation(args), args.seed)
    begun, companions = {"config": own_config(vae)}, ()
    begun["weights"] = args.vae and fingerprint_model(vae)
    if encoder := load_perceptual_encoder(args, accelerator):
        begun["perceptual encoder"] = fingerprint_model(encoder)
    if adversary := make_adversary(args, accelerator):
        begun["adversary"], companions = True, (adversary,)
    run = TrainingRun(opened, AutoencodingNetwork(vae), views, companions=companions, vae=begun)
    logger.info(
        f"Training {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M weights on {len(images)} images, "
        f"{len(held_out)} held out: {run.total} updates of {opened.images_per_update} images"
    )
    for batches in run.updates():
        losses = []
        for batch in batches:
            pixels = pixels_of(args, batch, accelerator.device)
            noise = [x.to(accelerator.device) for x in posterior_noise(vae, args, batch["position"])]
            with accelerator.accumulate(run.model):
                reconstruction, *rest = run.model(pixels, *noise)
                loss = loss_function(reconstruction, *rest)
                if encoder:
                    with accelerator.autocast():
                        loss = loss + args.perceptual_weight * perceptual_distance(encoder, reconstruction, pixels)
                if adversary:
                    disliked = adversary.loss(reconstruction, pixels, loss, vae.decoder.conv_out.weight)
                    loss = loss + args.adversarial_weight * disliked
                accelerator.backward(loss)
            if adversary:
                adversary.learn(pixels, reconstruction)
            losses.append(loss.detach())
        run.update(losses, batches[-1]["key"])
        due = args.validation_steps and run.step % args.validation_steps == 0 and not run.finished
        if due and accelerator.is_main_process:
            validate(args, vae, held_out, run.step)
    if run.finished and accelerator.is_main_process:
        validate(args, vae, held_out, run.step)  # first: it refuses what is not finite
        save_result(args, vae, images)
        run.write_card(args.vae, args.perceptual_encoder)
    accelerator.end_training()


class AutoencodingNetwork(nn.Module):
    """One forward pass from pixels to pixels, so that several processes average its gradients."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor, more: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels `(B, C, H, W)` in [-1, 1], noise `(B, L, h, w)` -> reconstruction, pixels, mean, logvar.

        `more` `(B, L or 1, 1, 1)` is added to the standard deviation of the latents.
        """
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + (posterior.std + more) * noise
        return self.vae.decode(latents).sample, pixels, posterior.mean, posterior.logvar


def split_images(args: Arguments, images: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Images to train on, and images of other patients to look at."""
    if not args.validation_data_dir and not 0 < args.num_validation_images < len(images):
        raise ValueError(
            f"--num_validation_images {args.num_validation_images} of {len(images)} images cannot be held out. Lower "
            "it, or give --validation_data_dir."
        )
    images, unseen = split_off_unseen(args, images, args.num_validation_images, share=1.0)
    return images, unseen.select(unseen.keys[: args.num_validation_images])


def make_vae(args: Arguments) -> AutoencoderKL:
    if args.freeze_encoder and not args.vae:
        raise ValueError("--freeze_encoder keeps the latents of an autoencoder: name it as --vae.")
    if args.latent_noise < 0:
        raise ValueError(f"--latent_noise must not be negative, got {args.latent_noise}.")
    if args.latent_noise and not args.freeze_encoder:
        raise ValueError("--latent_noise is for a decoder by itself: give --freeze_encoder, too.")
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, use_safetensors=True)
        take_architecture(args, vae)
    else:
        unfit = [channels for channels in args.block_out_channels if channels % args.norm_num_groups]
        if unfit:
            raise ValueError(f"--norm_num_groups {args.norm_num_groups} does not divide --block_out_channels {unfit}.")
        levels = len(args.block_out_channels)
        vae = AutoencoderKL(
            in_channels=args.in_channels,
            out_channels=args.in_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(args.block_out_channels),
            layers_per_block=args.layers_per_block,
            latent_channels=args.latent_channels,
            norm_num_groups=args.norm_num_groups,
            mid_block_add_attention=args.mid_block_add_attention,
            sample_size=args.resolution,
            scaling_factor=1.0,
        )
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    if args.resolution % vae_scale_factor(vae):
        raise ValueError(
            f"--resolution {args.resolution} is not a multiple of the VAE's {vae_scale_factor(vae)} pixels."
        )
    return vae.to(memory_format=torch.channels_last) if args.channels_last else vae


def take_architecture(args: Arguments, vae: AutoencoderKL) -> None:
    """Set the flags to what `--vae` has, for the card; refuse those that say otherwise."""
    defaults = Arguments()
    for name in ARCHITECTURE:
        theirs, ours = vae.config[name], getattr(args, name)
        theirs = list(theirs) if isinstance(theirs, tuple) else theirs
        if ours != theirs and (name == "in_channels" or ours != getattr(defaults, name)):
            raise ValueError(f"{args.vae} has {name} {theirs}, and --{name} is {ours}.")
        setattr(args, name, theirs)


def load_perceptual_encoder(args: Arguments, accelerator: Accelerator) -> DinoImageConditioner | None:
    if args.perceptual_encoder is None:
        args.perceptual_weight = None  # is not told
        return None
    if args.perceptual_weight <= 0:
        raise ValueError(f"--perceptual_weight must be positive, got {args.perceptual_weight}.")
    encoder = DinoImageConditioner.from_encoder(args.perceptual_encoder, tokens="all", size=args.perceptual_size)
    return encoder.to(accelerator.device)


def make_adversary(args: Arguments, accelerator: Accelerator) -> Adversary | None:
    if args.adversarial_weight < 0:
        raise ValueError(f"--adversarial_weight must not be negative, got {args.adversarial_weight}.")
    if not args.adversarial_weight:
        return None
    return Adversary(accelerator, PatchDiscriminator(args.in_channels), args.adversarial_learning_rate)


def check_crops(args: Arguments, vae: AutoencoderKL) -> None:
    factor = vae_scale_factor(vae)
    if args.crop_size and (args.crop_size % factor or not 0 < args.crop_size <= args.resolution):
        raise ValueError(
            f"--crop_size {args.crop_size} must be a multiple of the VAE's {factor} pixels, and at most --resolution "
            f"{args.resolution}."
        )


def pixels_of(args: Arguments, batch: dict[str, Any], device: torch.device) -> Tensor:
    """A batch `(B, C, H, W)` in [-1, 1] on the device, cropped where `--crop_size` says so."""
    images = batch["image"].to(device, non_blocking=True)
    if args.crop_size:
        images = random_crops(images, args.crop_size, args.seed, batch["position"])
    return unit_to_vae(images, args.in_channels)


def random_crops(images: Tensor, size: int, seed: int, positions: list[int]) -> Tensor:
    """One square `(B, C, size, size)` of each image `(B, C, H, W)`, which depends only on (seed, place in the run)."""
    room = torch.tensor(images.shape[-2:]) - size + 1
    crops = []
    for image, position in zip(images, positions, strict=True):
        y, x = (torch.rand(2, generator=generator_for(seed, "crops", position)) * room).long().tolist()
        crops.append(image[:, y : y + size, x : x + size])
    return torch.stack(crops)


def posterior_noise(vae: AutoencoderKL, args: Arguments, positions: list[int]) -> tuple[Tensor, Tensor]:
    """Noise `(B, L, h, w)` and what is added to the latents' own deviation `(B, L or 1, 1, 1)`.

    Both depend only on (seed, place in the run), so that a resumed run repeats them.
    """
    side = (args.crop_size or args.resolution) // vae_scale_factor(vae)
    shape = (vae.config["latent_channels"], side, side)
    generators = [generator_for(args.seed, "posterior", position) for position in positions]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    shares = torch.stack([torch.rand(1, generator=generator) for generator in generators])
    _, scale = shift_and_scale(vae, noise)
    return noise, args.latent_noise * shares[..., None, None] / scale


@torch.no_grad()
def validate(args: Arguments, vae: AutoencoderKL, held_out: ImageDataset, step: int) -> None:
    """Draw held-out images beside their reconstructions, and say how near they are."""
    sources, reconstructions = [], []
    for images in batches_of(held_out, args.train_batch_size):
        pixels = unit_to_vae(images.to(vae.device), args.in_channels)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        sources.append(vae_to_unit(pixels).cpu())
        reconstructions.append(vae_to_unit(decoded).cpu())
    sources, reconstructions = torch.cat(sources), torch.cat(reconstructions)
    quality = psnr(reconstructions, sources).mean().item()
    contact_sheet(sources, reconstructions).save(Path(args.output_dir, "reconstructions.png"))
    logger.info(f"step {step}: PSNR {quality:.2f} dB on {len(sources)} held-out images")
    if not math.isfinite(quality):
        raise FloatingPointError(f"Update {step}: the reconstructions are not finite. Lower --learning_rate.")


def save_result(args: Arguments, vae: AutoencoderKL, images: ImageDataset) -> None:
    """Save the autoencoder with the mean and standard deviation of its latents."""
    vae.eval()
    if not args.freeze_encoder:
        note_statistics(args, vae, images)
    put_result(Path(args.output_dir), vae.to(memory_format=torch.contiguous_format).save_pretrained)
    logger.info(f"The autoencoder is in {args.output_dir}")


@torch.no_grad()
def note_statistics(args: Arguments, vae: AutoencoderKL, images: ImageDataset) -> None:
    stride = max(1, len(images) // args.num_statistics_images)
    chosen = images.select(images.keys[::stride])

    def moments() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches_of(chosen, args.train_batch_size):
            posterior = vae.encode(unit_to_vae(batch.to(vae.device), args.in_channels)).latent_dist
            yield posterior.mean, posterior.std

    mean, std = latent_statistics(moments())
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)


def batches_of(images: ImageDataset, size: int) -> Iterator[Tensor]:
    """All images in order, `(B, C, H, W)` in [0, 1]."""
    for first in range(0, len(images), size):
        yield collate([images[i] for i in range(first, min(first + size, len(images)))])["image"]


if __name__ == "__main__":
    main()
