"""Distil a DinoDiffusionPipeline into one that needs 4 steps: phased consistency (arXiv 2405.18407), or LCM.

    accelerate launch examples/distill_dino.py --pretrained_pipeline my-model --train_data_dir /data/cxr \
        --output_dir my-fast-model

The pipeline is the frozen teacher. The student's UNet takes the guidance scale as an input, so that one pass does the
work of two. With `--rank` a LoRA for the teacher's own denoiser is trained instead, at one guidance scale.
"""

from __future__ import annotations

if __name__ == "__main__":
    import diffusers_dino.cli.early  # noqa: F401  (first: signals and readers that leave are minded from here on)

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from diffusers_dino import DinoDiffusionPipeline, data
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.run import Run, open_run
from diffusers_dino.cli.training_flags import (
    AugmentationArguments,
    ImageArguments,
    RunArguments,
    check_lora,
    make_augmentation,
    open_training_images,
)
from diffusers_dino.cli.training_run import TrainingRun
from diffusers_dino.denoisers import family_of
from diffusers_dino.fingerprints import fingerprint_pipeline
from diffusers_dino.fusion import fuse
from diffusers_dino.hub import TrainingRecord
from diffusers_dino.pipelines.lora import save_adapter
from diffusers_dino.pipelines.preparation import note_preparation
from diffusers_dino.schedules import embed_guidance, is_flow
from diffusers_dino.training import models, objective
from diffusers_dino.training.consistency import ConsistencySchedule, pseudo_huber
from diffusers_dino.training.features import FeatureEncoder, cache_in_memory
from diffusers_dino.training.run_folder import put_result
from diffusers_dino.training.self_distillation import update_teacher

logger = logging.getLogger("distill_dino")


@dataclass
class Arguments(RunArguments, AugmentationArguments, ImageArguments):
    learning_rate: float = flag(1e-4, "After warm-up.")
    adam_beta2: float = flag(0.999, "Second moment's decay.")
    adam_weight_decay: float = flag(0.0, "Weight decay, only of matrices and kernels.")
    lr_scheduler: str = flag("constant_with_warmup", "One of diffusers', such as constant, cosine, linear.")
    output_dir: str = flag("dino-distilled", "Where pipeline, checkpoints and train_log.jsonl go.", group="Output")
    pretrained_pipeline: str | None = flag(None, "The DinoDiffusionPipeline that teaches.", group="Teacher")
    revision: str | None = flag(None, "Its revision on the Hub.")
    variant: str | None = flag(None, "Its variant, such as fp16.")
    teacher_steps: int = flag(
        8, "Guided DDIM steps of the teacher's path; fewer take less training. A multiple of --phases."
    )
    phases: int = flag(4, "Steps that the student takes instead; 1 is LCM, whose function jumps to the image.")
    min_guidance: float | None = flag(None, "Smallest guidance scale to learn; 1, or 2 with --rank.")
    max_guidance: float | None = flag(None, "Largest guidance scale to learn; 4, or 2 with --rank.")
    rank: int | None = flag(None, "Train a LoRA of this rank, at one guidance scale.", group="Student")
    lora_alpha: float | None = flag(None, "Scale of the LoRA; the rank by default.")
    guidance_width: int = flag(256, "Width of the guidance scale's embedding.")
    target_decay: float = flag(0.95, "Of the average of the student, which it is to agree with.")
    huber_c: float = flag(1e-3, "Where the pseudo-Huber loss turns from a square to a line.")
    cache_views: int = flag(0, "Encode this many views of each image once; 0 makes new ones.", group="Cached features")
    cache_batch_size: int = flag(32, "Views encoded at once for --cache_views.")
    feature_cache: str | None = flag(None, "Folder that `diffusers-dino cache` makes: train on the views in it.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    check_lora(args)
    args.min_guidance, args.max_guidance = check_guidance(args)  # which cards tell
    with open_run(args, logger) as run:
        train(args, run)


def train(args: Arguments, opened: Run) -> None:
    accelerator = opened.accelerator
    with accelerator.main_process_first():  # one process downloads
        pipe = load_teacher(args)
    schedule = ConsistencySchedule(pipe.scheduler, args.teacher_steps, args.phases).to(accelerator.device)
    images = open_training_images(args, pipe, may_differ=args.rank is None)
    models.latent_shape(pipe.vae, pipe.denoiser, args.resolution)  # checks the resolution
    teacher = {**fingerprint_pipeline(pipe), "lora_alpha": args.rank and (args.lora_alpha or args.rank)}
    student = make_student(args, pipe.denoiser)
    if not args.rank:
        note_preparation(student, images.preprocessing, pipe.vae.config["in_channels"])
    views = data.TrainingViews(images, make_augmentation(args), args.seed)
    if args.feature_cache:
        views = opened.open_cache(views, pipe.vae, pipe.conditioner, args.cache_views)
    frozen_dtype = models.frozen_dtype(accelerator.mixed_precision)
    for model in filter(None, (pipe.vae, pipe.conditioner, pipe.fusion, pipe.denoiser)):
        nn.Module.to(model.requires_grad_(False), accelerator.device, frozen_dtype)
    target = copy.deepcopy(student).requires_grad_(False).eval().to(accelerator.device)
    encode = FeatureEncoder(pipe.vae, pipe.conditioner, accelerator.device)
    if args.cache_views and not args.feature_cache:
        views = cache_in_memory(views, encode, args.cache_views, args.cache_batch_size, accelerator)
    run = TrainingRun(opened, student, views, companions=(target,), encode=encode, teacher=teacher)
    logger.info(
        f"Distilling {sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6:.2f} M weights on "
        f"{len(images)} images: {run.total} updates of {opened.images_per_update} images"
    )

    if run.total < 3 * (needed := round(args.teacher_steps / args.phases / max(1 - args.target_decay, 1e-3))):
        logger.warning(
            f"What the student learns at the end of a phase travels to its start step by step, in about {needed} "
            "updates (teacher_steps / phases / (1 - target_decay)): train for some times as many, or lower "
            "--teacher_steps."
        )

    for batches in run.updates():
        losses = []
        for batch in batches:
            with accelerator.accumulate(run.model):
                loss = compute_loss(args, pipe, run.model, target, schedule, encode, batch, accelerator.autocast)
                accelerator.backward(loss)
            losses.append(loss.detach())
        run.update(losses, batches[-1]["key"])
        update_teacher(target, accelerator.unwrap_model(run.model), args.target_decay)
    if run.finished and accelerator.is_main_process:
        save_result(args, target, schedule.sampler())
        run.write_card(args.pretrained_pipeline)
        logger.info(f"The result is in {args.output_dir}")
    accelerator.end_training()


def compute_loss(
    args: Arguments,
    pipe: DinoDiffusionPipeline,
    model: nn.Module,
    target: nn.Module,
    schedule: ConsistencySchedule,
    encode: FeatureEncoder,
    batch: dict[str, Any],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """How far the student, `model`, is from its average, `target`, one step on along the teacher's path: a scalar."""
    predict, (low, high) = family_of(pipe.denoiser).predict, check_guidance(args)
    mean, std, tokens = encode(batch)
    total = pipe.scheduler.config["num_train_timesteps"]
    draws = objective.draw_for_training(batch["position"], mean.shape[1:], total, args.seed).to(mean.device)
    start, end, edge = schedule.neighbours(draws.timesteps)
    noisy = schedule.add_noise(mean + std * draws.latent_noise, draws.noise, start)
    guidance = low + (high - low) * draws.drop  # which is uniform, and drops nothing here
    condition = fuse(pipe.fusion, tokens)
    embedded = None if args.rank else embed_guidance(guidance, args.guidance_width)
    with torch.no_grad(), autocast():
        null = pipe.conditioner.null_condition(len(tokens)).to(tokens)
        both = predict(
            pipe.denoiser,
            torch.cat([noisy, noisy]),
            torch.cat([start, start]),
            fuse(pipe.fusion, torch.cat([null, tokens])),
        )
        unconditional, conditional = both.float().chunk(2)
        guided = unconditional + guidance.view(-1, 1, 1, 1) * (conditional - unconditional)
        before = schedule.jump(guided, noisy, start, end)
        answer = predict(target, before, end.clamp(min=0), condition, embedded).float()
    answer = schedule.jump(answer, before, end, edge)
    prediction = predict(model, noisy, start, condition, embedded).float()
    return pseudo_huber(schedule.jump(prediction, noisy, start, edge), answer, args.huber_c)


def check_guidance(args: Arguments) -> tuple[float, float]:
    """The interval of guidance scales that the student learns."""
    low = (2.0 if args.rank else 1.0) if args.min_guidance is None else args.min_guidance
    high = (max(low, 2.0) if args.rank else max(low, 4.0)) if args.max_guidance is None else args.max_guidance
    if not 1 <= low <= high:
        raise ValueError(f"Guidance scales must be 1 <= --min_guidance <= --max_guidance, got {low} and {high}.")
    if args.rank and low != high:
        raise ValueError(
            "A LoRA has no input for the guidance scale: give --min_guidance and --max_guidance the same value, or "
            "leave --rank out."
        )
    return low, high


def load_teacher(args: Arguments) -> DinoDiffusionPipeline:
    if not args.pretrained_pipeline:
        raise ValueError("There is nothing to distil: give --pretrained_pipeline.")
    pipe = DinoDiffusionPipeline.from_pretrained(
        args.pretrained_pipeline, guider=None, guide=None, revision=args.revision, variant=args.variant
    )
    if is_flow(pipe.scheduler):
        raise ValueError("A consistency model follows a diffusion's noise schedule; this teacher has a flow's.")
    if pipe.denoiser.config.get("time_cond_proj_dim") is not None:
        raise ValueError("This pipeline is distilled already: give the one that taught it.")
    facts = TrainingRecord.load(args.pretrained_pipeline).facts
    if facts and not facts.get("condition dropout") and check_guidance(args) != (1.0, 1.0):
        raise ValueError(
            "The teacher was trained without dropping its condition (condition_dropout 0), so it knows no guidance. "
            "Give --min_guidance 1 --max_guidance 1, or train it with --condition_dropout 0.1."
        )
    return pipe


def make_student(args: Arguments, teacher: ModelMixin) -> ModelMixin:
    """A copy of the teacher with an input for the guidance scale, or with a LoRA."""
    if args.rank:
        student = copy.deepcopy(teacher)
        models.add_lora(student, args.rank, args.lora_alpha)
        return student
    if not isinstance(teacher, UNet2DConditionModel):
        raise ValueError(
            f"A {type(teacher).__name__} has no input for the guidance scale: train a LoRA at one scale, with --rank."
        )
    config = {**teacher.config, "time_cond_proj_dim": args.guidance_width}
    config.pop("_use_default_values", None)  # by which diffusers would leave the new input out
    student = UNet2DConditionModel.from_config(config)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})  # which lacks the new input
    nn.init.zeros_(student.time_embedding.cond_proj.weight)  # it starts as the teacher
    return student


def save_result(args: Arguments, target: ModelMixin, scheduler: SchedulerMixin) -> None:
    """Save the averaged student, with the scheduler that samples it."""
    if args.rank:

        def write(folder: Path) -> None:
            save_adapter(target, folder)
            scheduler.save_pretrained(folder / "scheduler")

        put_result(Path(args.output_dir), write)
        return
    whole = DinoDiffusionPipeline.from_pretrained(
        args.pretrained_pipeline,
        unet=target,
        scheduler=scheduler,
        guider=None,
        guide=None,
        revision=args.revision,
        variant=args.variant,
    )
    put_result(Path(args.output_dir), whole.save_pretrained)


if __name__ == "__main__":
    main()
