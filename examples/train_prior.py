r"""Train a DinoPrior on the tokens of images, so that a DinoDiffusionPipeline generates without an image.

    accelerate launch examples/train_prior.py --pretrained_pipeline my-model --train_data_dir /data/cxr \
        --labels /data/cxr.csv --output_dir my-prior

Labels, metadata and text are optional. The encoder stays frozen. `--output_dir` becomes a DinoPriorPipeline.
"""

from __future__ import annotations

if __name__ == "__main__":
    import diffusers_dino.cli.early  # noqa: F401  (first: signals and readers that leave are minded from here on)

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel

from diffusers_dino import DinoPrior, DinoPriorPipeline, data
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.image_flags import STORED
from diffusers_dino.cli.run import Run, open_run
from diffusers_dino.cli.training_flags import (
    RunArguments,
    SharingArguments,
    TokenArguments,
    check_conditioner,
    load_conditioner,
    open_unseen,
    open_views,
)
from diffusers_dino.fingerprints import own_config
from diffusers_dino.hub.privacy import without_folders
from diffusers_dino.prior import describe_conditioner
from diffusers_dino.prior.flow import draw_for_prior
from diffusers_dino.prior.table import Columns, Facts, make_conditions, read_facts, stored_facts
from diffusers_dino.training import optim, prior
from diffusers_dino.training.features import FeatureEncoder, Views, cache_in_memory
from diffusers_dino.training.run_folder import put_result
from diffusers_dino.training.state import TrainingState
from diffusers_dino.training.tally import Tally

logger = logging.getLogger("train_prior")

MAX_STATISTICS = 20_000  # images whose tokens give mean and covariance


@dataclass
class Arguments(SharingArguments, RunArguments, TokenArguments):
    """Flags of images, views and conditioner, then those of the run, then these; a repeated one sets its default."""

    augment: bool = flag(
        False, "Learn the tokens of random views; by default of the images as they are.", group="Augmentation"
    )
    cache_views: int = flag(
        1, "Views of each image whose tokens are computed once; 0 encodes in each epoch anew.", group="Cached features"
    )
    train_batch_size: int = flag(128, "Images per device and forward pass.", group="Optimisation")
    max_train_steps: int | None = flag(1500, "Length of training in updates, unless it is stopped early.")
    adam_weight_decay: float = flag(0.02, "Weight decay, only of matrices.")
    output_dir: str = flag("dino-prior", "Where the pipeline, checkpoints and logs go.", group="Output")
    weights_dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights of the result.")
    labels: str | None = flag(
        None,
        f"CSV of what is known of the images, or {STORED!r} for the JSON beside images in shards.",
        group="Condition",
    )
    key_column: str = flag("file", "Column of the CSV: keys or file names.")
    label_column: str | None = flag(
        "findings", "Column of labels, joined by |; X? is unknown. `none` leaves them out."
    )
    exclusive_labels: list[str] | None = flag(
        None, "Labels that come without any other; by default No Finding, if there is one."
    )
    patient_column: str | None = flag(None, "Column of patients, who are held out whole.")
    number_columns: list[str] | None = flag(None, "Columns of numbers, such as age.")
    category_columns: list[str] | None = flag(None, "Columns of categories, such as view and sex.")
    text_column: str | None = flag(None, "Column of texts; needs --text_encoder.")
    text_encoder: str | None = flag(None, "Frozen text encoder of transformers: a folder or a repository of the Hub.")
    text_revision: str | None = flag(None, "Its revision.")
    text_length: int = flag(77, "Tokens that texts are cut to.")
    width: int = flag(256, "Width of the prior.", group="Prior")
    num_layers: int = flag(4, "Its blocks.")
    num_heads: int = flag(4, "Its attention heads.")
    mlp_ratio: float = flag(4.0, "Width of its MLPs, in units of --width.")
    num_components: int = flag(128, "Directions of the Gaussian that it begins as.")
    condition_dropout: float = flag(
        0.1, "Fraction of images whose condition is dropped, for guidance.", group="Objective"
    )
    label_dropout: float = flag(0.3, "Mean share of an image's labels that is hidden.")
    times: Literal["logit-normal", "uniform"] = flag("logit-normal", "How the noise levels are drawn.")
    use_ema: bool = flag(True, "Average the weights; looks and the result use the average.")
    ema_decay: float = flag(0.999, "Decay of the average.")
    validation_data_dir: str | None = flag(
        None, "Unseen images, in the forms of --train_data_dir, named in the same CSV.", group="Validation"
    )
    validation_share: float = flag(0.1, "Share of the patients or images that is held out, if there are no others.")
    validation_steps: int = flag(100, "Updates between looks at held-out images; 0 never looks.")
    validation_images: int = flag(256, "Held-out images to look at, at most; all are left out of training.")
    validation_draws: int = flag(8, "Fixed noise and times for each of them.")
    patience: int = flag(8, "Stop after this many looks without a lower loss; 0 never stops.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    check_arguments(args)
    with open_run(args, logger, tracker=args.report_to) as run:
        run_training(args, run)


def run_training(args: Arguments, run: Run) -> None:
    """From the images and the conditioner that the flags name to a pipeline in `--output_dir`."""
    accelerator = run.accelerator
    columns = name_columns(args)

    # 1. Images, what is known of them, and their tokens
    views = open_views(args, may_differ=False)
    facts = read_known(args, views.images, columns)
    chosen = prior.split_held_out(
        views.images.keys,
        [own.patient for own in facts],
        0.0 if args.validation_data_dir or not args.validation_steps else args.validation_share,
        args.seed,
    )
    kept = [key for key, out in zip(views.images.keys, chosen, strict=True) if not out]
    left = [key for key, out in zip(views.images.keys, chosen, strict=True) if out]
    with accelerator.main_process_first():  # one process downloads
        conditioner = load_conditioner(args, views.images, accelerator.device)
        text_encoder, tokenizer = load_text_encoder(args)
    known = describe_conditioner(conditioner)
    conditioner.to(accelerator.device)
    encode = FeatureEncoder(None, conditioner, accelerator.device)
    training = open_tokens(args, run, views, kept, encode)
    tokens, _ = prior.encode_tokens(training, encode, range(0, len(training), -(-len(training) // MAX_STATISTICS)))

    # 2. The prior
    conditions = make_conditions(
        [own for own, out in zip(facts, chosen, strict=True) if not out],
        columns,
        args.exclusive_labels,
        text_encoder and text_encoder.config.hidden_size,
    )
    model = DinoPrior(
        num_tokens=conditioner.num_tokens,
        token_dim=conditioner.token_dim,
        width=args.width,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        mlp_ratio=args.mlp_ratio,
        num_components=min(args.num_components, conditioner.num_tokens * conditioner.token_dim),
        labels=conditions.labels,
        exclusive_labels=conditions.exclusive,
        numbers=dict(conditions.numbers),
        categories=dict(conditions.categories),
        text_dim=conditions.text_dim,
        text_encoder=without_folders(args.text_encoder),
        text_revision=args.text_revision,
        text_length=args.text_length,
        conditioner=known,
    )
    model.fit_tokens(tokens)
    model.to(accelerator.device)
    pipe = DinoPriorPipeline(model, FlowMatchEulerDiscreteScheduler(), text_encoder, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    known_facts = prior.KnownFacts(views.images.keys, facts, conditions, pipe.encode_text)
    held_out = open_held_out(args, run, views, left, columns, encode, known_facts, pipe)

    # 3. Train
    run.begin(training.images, prior=own_config(model))
    total_steps = run.count_updates(len(training))
    optimizer = torch.optim.AdamW(
        optim.decay_matrices(model, args.adam_weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=total_steps
    )
    decay = args.ema_decay if args.use_ema else None
    state = TrainingState(accelerator, model, optimizer, lr_scheduler, ema_decay=decay, folder="prior")
    run.open_trackers()
    validator = prior.PriorValidator(
        pipe,
        state,
        held_out,
        args.output_dir,
        reference=tokens,
        every=args.validation_steps,
        patience=args.patience,
        num_images=args.validation_images,
        num_draws=args.validation_draws,
        seed=args.seed,
    )
    logger.info(
        f"Training {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights on the tokens of {len(training)} "
        f"images, labels {', '.join(conditions.labels) or 'none'}: at most {total_steps} steps of "
        f"{accelerator.num_processes} x {args.train_batch_size} x {args.gradient_accumulation_steps}"
    )
    step, finished = train(args, run, pipe, training, encode, known_facts, state, validator, total_steps)
    if not finished:
        run.say_stopped(step)
    elif accelerator.is_main_process:
        save_result(args, run, pipe, state, validator, step, len(training))
    accelerator.end_training()


def train(
    args: Arguments,
    run: Run,
    pipe: DinoPriorPipeline,
    views: Views,
    encode: FeatureEncoder,
    facts: prior.KnownFacts,
    state: TrainingState,
    validator: prior.PriorValidator,
    total_steps: int,
) -> tuple[int, bool]:
    """The loop. Returns the number of updates done, and whether training is at its end."""
    accelerator, trainable = state.accelerator, list(state.trainable.values())
    step, position = run.resume(state)
    converged = False
    if run.found is not None:
        validator.load_state_dict(run.found.info["looks"])
        converged = validator.is_late()
    batches = run.load_batches(views, position, encode)
    progress = run.open_progress(step, total_steps)
    if not validator.looks:
        validator.run(0, progress.say)  # the Gaussian that it begins as
    tally = Tally(accelerator, state.optimizer, run.interruption)
    while step < total_steps and not tally.stop and not converged:
        loss_sum = torch.zeros((), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            with accelerator.accumulate(state.model):
                loss = compute_loss(args, pipe, state.model, encode, facts, batch)
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
        converged = validator.run(step, progress.say)
        if tally.stop or tally.save or is_checkpoint:
            run.save(state, step, position, looks=validator.state_dict())
    progress.close()
    return step, converged or step >= total_steps


def compute_loss(
    args: Arguments,
    pipe: DinoPriorPipeline,
    model: torch.nn.Module,
    encode: FeatureEncoder,
    facts: prior.KnownFacts,
    batch: dict[str, Any],
) -> torch.Tensor:
    """The squared error of the velocity that `model` predicts for a batch: a scalar."""
    tokens = pipe.prior.standardise(encode(batch).tokens)  # (B, S, D)
    draws = draw_for_prior(
        batch["position"], pipe.prior.token_shape, len(pipe.labels), seed=args.seed, times=args.times
    ).to(tokens.device)
    condition = facts.of(batch["key"]).to(tokens.device)
    condition = prior.drop_facts(condition, draws, args.condition_dropout, args.label_dropout)
    return prior.prior_losses(model, tokens, condition, draws).mean()


def check_arguments(args: Arguments) -> None:
    check_conditioner(args)
    asked = [*(args.number_columns or ()), *(args.category_columns or ()), *filter(None, [args.text_column])]
    if asked and not args.labels:
        raise ValueError(f"{', '.join(asked)} must be columns of a table: give it as --labels.")
    if bool(args.text_column) != bool(args.text_encoder):
        raise ValueError("Text needs both --text_column and --text_encoder.")
    for name in ("condition_dropout", "label_dropout"):
        limit = 0.5 if name == "label_dropout" else 1
        if not 0 <= getattr(args, name) <= limit:
            raise ValueError(f"--{name} must be in [0, {limit}], got {getattr(args, name)}.")


def name_columns(args: Arguments) -> Columns:
    return Columns(
        args.key_column,
        None if args.labels is None or args.label_column in (None, "none") else args.label_column,
        args.patient_column,
        tuple(args.number_columns or ()),
        tuple(args.category_columns or ()),
        args.text_column,
    )


def read_known(args: Arguments, images: data.ImageDataset, columns: Columns) -> list[Facts]:
    """What is known of each image, in their order."""
    if args.labels is None:
        return [Facts()] * len(images)
    return stored_facts(images, columns) if args.labels == STORED else read_facts(args.labels, images.keys, columns)


def load_text_encoder(args: Arguments) -> tuple[Any, Any]:
    if args.text_encoder is None:
        return None, None
    tokenizer = AutoTokenizer.from_pretrained(args.text_encoder, revision=args.text_revision)
    config = AutoConfig.from_pretrained(args.text_encoder, revision=args.text_revision)
    kind = CLIPTextModel if config.model_type.startswith("clip") else AutoModelForTextEncoding
    encoder = kind.from_pretrained(args.text_encoder, revision=args.text_revision, use_safetensors=True)
    return encoder.eval().requires_grad_(False), tokenizer


def open_tokens(
    args: Arguments, run: Run, views: data.TrainingViews, keys: list[str], encode: FeatureEncoder
) -> Views:
    """Views of some images: with their tokens, unless they are encoded anew in each epoch."""
    images = views.images if len(keys) == len(views) else views.images.select(keys)
    chosen = data.TrainingViews(images, views.augmentation, args.seed)
    if args.feature_cache:
        return run.open_cache(chosen, None, encode.conditioner)
    if args.cache_views:
        return cache_in_memory(chosen, encode, args.cache_views, args.cache_batch_size, run.accelerator)
    return chosen


def open_held_out(
    args: Arguments,
    run: Run,
    views: data.TrainingViews,
    keys: list[str],
    columns: Columns,
    encode: FeatureEncoder,
    facts: prior.KnownFacts,
    pipe: DinoPriorPipeline,
) -> prior.HeldOut | None:
    """Tokens and conditions of images that are not trained on."""
    if args.validation_data_dir and args.validation_steps:
        images = open_unseen(args, args.validation_data_dir, views.images)
        known = read_known(args, images, columns)
        facts = prior.KnownFacts(images.keys, known, pipe.prior.conditions, pipe.encode_text)
        held: Views = data.TrainingViews(images, None, args.seed)
    elif keys:
        held = open_tokens(args, run, views, keys, encode)
    else:
        return None
    tokens, shown = prior.encode_tokens(held, encode, range(len(held)))
    return prior.HeldOut(tokens, facts.of(shown))


def save_result(
    args: Arguments,
    run: Run,
    pipe: DinoPriorPipeline,
    state: TrainingState,
    validator: prior.PriorValidator,
    num_updates: int,
    num_images: int,
) -> None:
    """Write the pipeline, with the weights of the lowest validation loss if there is one."""
    with state.averaged_weights():
        best = Path(args.output_dir, "best", "prior", SAFETENSORS_WEIGHTS_NAME)
        if validator.best is not None and best.is_file():  # set aside where a run went back
            num_updates = validator.best.step
            pipe.prior.load_state_dict(load_file(best))
        torch.nn.Module.to(pipe.prior, getattr(torch, args.weights_dtype))  # statistics stay float32
        put_result(Path(args.output_dir), pipe.save_pretrained)
    bases = [args.pretrained_pipeline, args.conditioner, args.text_encoder, *(args.encoder or [])]
    run.write_card(num_images, num_updates, bases)
    logger.info(f"The result is in {args.output_dir}")


if __name__ == "__main__":
    main()
