"""Pretrain a small DINO encoder from unlabelled images by self-distillation, for sites that have nothing else.

    accelerate launch examples/pretrain_dino.py examples/configs/tiny_dino.yaml --train_data_dir /data/cxr

A student sees several crops of an image, a teacher (the student's moving average) the large ones; the student learns
to give each crop the teacher's answer to another one (DINO, arXiv 2104.14294). As in DINOv2 (arXiv 2304.07193) the
answers are spread by Sinkhorn's iterations, the features by KoLeo. `--output_dir` becomes a `DinoImageConditioner`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import diffusers_dino.cli.early  # noqa: F401  (first: signals and readers that leave are minded from here on)

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.new_encoder import NewEncoderArguments, new_encoder_config, save_as_conditioner
from diffusers_dino.cli.run import Run, open_run
from diffusers_dino.cli.training_flags import ImageArguments, RunArguments, open_training_images, take_from_model
from diffusers_dino.cli.training_run import TrainingRun
from diffusers_dino.data import ImageDataset, TrainingViews
from diffusers_dino.fingerprints import fingerprint_model
from diffusers_dino.seeds import generator_for
from diffusers_dino.training.features import evenly_spread
from diffusers_dino.training.self_distillation import (
    Crops,
    DistillationNetwork,
    cross_view_loss,
    effective_rank,
    update_teacher,
)

try:
    from lightly.loss import KoLeoLoss
    from lightly.loss.swav_loss import sinkhorn
    from lightly.models.modules import DINOProjectionHead
    from lightly.utils.scheduler import cosine_schedule
except ImportError as error:
    raise ImportError("Pretraining an encoder needs lightly: pip install diffusers-dino[train]") from error

logger = logging.getLogger("pretrain_dino")

SHAPE = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "num_register_tokens")


@dataclass
class Arguments(RunArguments, NewEncoderArguments, ImageArguments):
    pretrained_model_name_or_path: str | None = flag(
        None, "DINOv2 with registers to continue from; else a new one.", group="Encoder"
    )
    image_size: int | None = flag(None, "Side of the images the encoder sees; --resolution by default.", group="Views")
    min_global_crop: float = flag(0.5, "Smallest area of a large crop.")
    max_global_crop: float = flag(1.0, "Largest area of a large crop.")
    local_crops: int = flag(4, "Small crops of each image; 0 for none.")
    local_crop_size: int = flag(96, "Their side.")
    min_local_crop: float = flag(0.15, "Smallest area of a small crop.")
    max_local_crop: float = flag(0.5, "Largest area of a small crop.")
    exposure: float = flag(0.3, "Strength of random contrast and brightness.")
    num_prototypes: int = flag(4096, "Answers that the head chooses from, K.", group="Objective")
    head_hidden_size: int = flag(2048, "Hidden width of the head.")
    head_bottleneck_size: int = flag(256, "Width before the answers.")
    teacher_temperature: float = flag(0.04, "Of Sinkhorn's iterations.")
    student_temperature: float = flag(0.1, "Of the student's softmax.")
    koleo_weight: float = flag(0.1, "Weight of the spread of features within the batch of a device.")
    teacher_momentum: float = flag(0.99, "Of the moving average; rises to 1 along a cosine.")
    diagnosis_steps: int = flag(
        200, "Updates between diagnoses of collapse; 0 diagnoses only at the end.", group="Diagnosis"
    )
    min_effective_rank: float = flag(2.0, "Stop with an error if the features of the teacher have a lower rank.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    with open_run(args, logger) as run:
        train(args, run)


def train(args: Arguments, opened: Run) -> None:
    accelerator = opened.accelerator
    images = open_training_images(args)
    config = make_config(args)
    large, small = make_crops(args)
    student, teacher = make_networks(args, config)
    teacher.to(accelerator.device)
    koleo = KoLeoLoss()
    begun = {"config": config.to_diff_dict(), "prototypes": args.num_prototypes}
    begun["weights"] = args.pretrained_model_name_or_path and fingerprint_model(student.encoder)
    begun["pixels"] = [args.pixel_mean, args.pixel_std]
    views = TrainingViews(images, None, args.seed)
    run = TrainingRun(opened, student, views, companions=(teacher,), encoder=begun)
    logger.info(
        f"Training {sum(p.numel() for p in teacher.encoder.parameters()) / 1e6:.2f} M weights on {len(images)} "
        f"images: {run.total} updates of {opened.images_per_update} images"
    )

    def compute_loss(pixels: Tensor, generator: torch.Generator) -> Tensor:
        num_images = len(pixels)
        views = [torch.cat([large(pixels, generator) for _ in range(2)])]
        if small:
            views.append(torch.cat([small(pixels, generator) for _ in range(args.local_crops)]))
        with torch.no_grad(), accelerator.autocast():
            answers = teacher(views[:1])[1].float()
        targets = sinkhorn(answers, epsilon=args.teacher_temperature, gather_distributed=True)
        features, logits = run.model(views)
        spread = sum(koleo(view.float()) for view in features.split(num_images)) / 2
        distillation = cross_view_loss(logits, targets, num_images, args.student_temperature)
        return distillation + args.koleo_weight * spread

    for batches in run.updates():
        losses = []
        for batch in batches:
            pixels = batch["image"].to(accelerator.device, non_blocking=True)
            # Draws depend only on (seed, place in the run), so that a resumed run repeats them.
            generator = generator_for(args.seed, "crops", batch["position"][0])
            with accelerator.accumulate(run.model):
                loss = compute_loss(pixels, generator)
                accelerator.backward(loss)
            losses.append(loss.detach())
        run.update(losses, batches[-1]["key"])
        momentum = cosine_schedule(run.step, run.total, args.teacher_momentum, 1.0)
        update_teacher(teacher, accelerator.unwrap_model(run.model), momentum)
        if args.diagnosis_steps and run.step % args.diagnosis_steps == 0 and not run.finished:
            diagnose(args, teacher, images, run.step)
    if run.finished:
        diagnosis = diagnose(args, teacher, images, run.step)
        if accelerator.is_main_process:
            Path(args.output_dir, "diagnosis.json").write_text(json.dumps(diagnosis, indent=1))
            save_as_conditioner(args, teacher.encoder, images, large.size)
            run.write_card(args.pretrained_model_name_or_path)
    accelerator.end_training()


def make_config(args: Arguments) -> Dinov2WithRegistersConfig:
    if args.pretrained_model_name_or_path:
        config = Dinov2WithRegistersConfig.from_pretrained(args.pretrained_model_name_or_path)
        shape = {name: getattr(config, name) for name in SHAPE}
        take_from_model(args, "--pretrained_model_name_or_path", **shape)
        return config
    return new_encoder_config(args, args.image_size or args.resolution)


def make_crops(args: Arguments) -> tuple[Crops, Crops | None]:
    """Large and small ones; None for no small ones."""
    image_size = args.image_size or args.resolution
    sizes = {"image_size": image_size} | ({"local_crop_size": args.local_crop_size} if args.local_crops else {})
    for name, size in sizes.items():
        if size % args.patch_size:
            raise ValueError(f"--{name} {size} is not a multiple of --patch_size {args.patch_size}.")
    large = Crops(image_size, (args.min_global_crop, args.max_global_crop), exposure=args.exposure)
    if not args.local_crops:
        return large, None
    return large, Crops(args.local_crop_size, (args.min_local_crop, args.max_local_crop), exposure=args.exposure)


def make_networks(
    args: Arguments, config: Dinov2WithRegistersConfig
) -> tuple[DistillationNetwork, DistillationNetwork]:
    """The student, and a teacher with the same weights."""

    def make() -> DistillationNetwork:
        encoder = Dinov2WithRegistersModel(config)
        width = DistillationNetwork.global_width(encoder)
        head = DINOProjectionHead(width, args.head_hidden_size, args.head_bottleneck_size, args.num_prototypes)
        return DistillationNetwork(encoder, head, args.pixel_mean, args.pixel_std)

    student, teacher = make(), make()
    if args.pretrained_model_name_or_path:
        student.encoder = Dinov2WithRegistersModel.from_pretrained(
            args.pretrained_model_name_or_path, use_safetensors=True
        )
    student.encoder.embeddings.mask_token.requires_grad_(False)  # no patch is masked; it would wait for a gradient
    teacher.load_state_dict(student.state_dict())  # lightly's head cannot be deep-copied
    return student, teacher.requires_grad_(False).eval()


@torch.no_grad()
def diagnose(args: Arguments, teacher: DistillationNetwork, images: ImageDataset, step: int) -> dict[str, Any]:
    """Tell how far the teacher's features of whole images are apart.

    Raises:
        RuntimeError: They have collapsed: all images get the same answer, and no condition can be made of it.
    """
    device = next(teacher.parameters()).device
    size = args.image_size or args.resolution
    whole = Crops(size, (1.0, 1.0), ratio=1.0, exposure=0.0)
    views = [whole(image[None].to(device), torch.Generator()) for image in evenly_spread(images, 256)]
    features = torch.cat([teacher.embed(view).float().cpu() for view in views])
    finding = {
        "step": step,
        "token_std": features.std(dim=0).mean().item(),
        "effective_rank": effective_rank(features),
        "num_images": len(features),
        "ln_k": math.log(args.num_prototypes),
    }
    logger.info(
        f"step {step}: std of the tokens over images {finding['token_std']:.3f}, effective rank "
        f"{finding['effective_rank']:.1f} of {features.shape[1]} features (a loss of ln K = {finding['ln_k']:.2f} "
        "is what an untrained student has)"
    )
    if not finding["token_std"] > 1e-2 or finding["effective_rank"] < args.min_effective_rank:
        raise RuntimeError(
            f"The encoder has collapsed at update {step}: the tokens of {len(features)} images have a standard "
            f"deviation of {finding['token_std']:.2g} and an effective rank of {finding['effective_rank']:.1f}. Lower "
            "--learning_rate or --teacher_temperature, raise --koleo_weight or --train_batch_size."
        )
    return finding


if __name__ == "__main__":
    main()
