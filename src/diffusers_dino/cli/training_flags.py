"""Flags that several trainings share, and what they open.

The dataclass of a program inherits them. A field that it declares again keeps its place and gets another default.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from .. import data
from ..conditioner import DinoImageConditioner
from ..data.facts import facts_beside, patient_in
from ..data.keys import read_keys
from ..data.sharding.manifest import read_manifest
from ..latents import VAE
from ..pipelines.preparation import preparation_for, stored_preparation
from ..training.features import evenly_spread
from ..training.models import load_vae
from .arguments import flag, settings_of

__all__ = [
    "AugmentationArguments",
    "FeatureArguments",
    "ImageArguments",
    "RunArguments",
    "SharingArguments",
    "TokenArguments",
    "check_conditioner",
    "check_frozen_models",
    "check_lora",
    "load_conditioner",
    "load_frozen",
    "make_augmentation",
    "open_training_images",
    "open_views",
    "patients_of",
    "split_off_unseen",
    "take_from_model",
]

logger = logging.getLogger("diffusers_dino")

# What a whole pipeline decides.
_OF_OTHER_MODELS = ("vae", "pretrained_model_name_or_path", "tokens", "projection_dim", "normalize_tokens")
_OF_OTHER_MODELS += ("unet", "unet_config", "transformer", "transformer_config", "qk_init_scale")
_OF_OTHER_MODELS += ("scheduler", "prediction_type", "flow_shift", "rescale_betas_zero_snr")


@dataclass
class ImageArguments:
    """Which images a training sees, and in which order."""

    train_data_dir: str | None = flag(
        None, "Folder or URL of images, tars, or `datasets` folder.", aliases=["--train_data"], group="Data"
    )
    dataset_name: str | None = flag(None, "Data set of the Hugging Face Hub, in place of a local one.")
    dataset_config_name: str | None = flag(None, "Its configuration.")
    dataset_split: str = flag("train", "Split of a `datasets` set, or of a folder of shards with a manifest.")
    image_column: str = flag(
        "image", "Column of images of a `datasets` set; in tars, which file of a sample (`seg.png`)."
    )
    keys_file: str | None = flag(None, "Text file of sample keys, one a line: train only on these.")
    max_train_samples: int | None = flag(None, "Train only on the first samples.")
    in_memory: bool = flag(False, "Prepare all images once and keep them in memory: for small sets.")
    max_unreadable: float = flag(0.05, "Largest tolerated fraction of images that cannot be read.")
    shuffle_window_shards: int = flag(
        0, "Shuffle within windows of this many shards: for remote or huge sets; 0 is full."
    )
    dataloader_num_workers: int = flag(0, "Processes that load data; 0 loads in the main process.")
    resolution: int = flag(256, "Side of the images in pixels.")
    remove_borders: bool | None = flag(
        None, "Cut uniform borders off; by default as for the pipeline that it starts from, else yes."
    )
    seed: int = flag(0, "Seed of everything random.")


@dataclass
class AugmentationArguments:
    """Random views of the images."""

    augment: bool = flag(True, "Show a random view of an image in each epoch.", group="Augmentation")
    sharpness: float = flag(1.0, "Largest weight of the random unsharp mask.")
    shear: float = flag(0.05, "Largest shear, as a fraction of the side.")
    translation: float = flag(0.05, "Largest shift, as a fraction of the side.")
    min_scale: float = flag(0.9, "Smallest magnification.")
    max_scale: float = flag(1.4, "Largest magnification.")
    random_flip: bool = flag(False, "Mirror half of the images. It exchanges the patient's sides.")


@dataclass
class TokenArguments(AugmentationArguments, ImageArguments):
    """All that decides over the tokens of images: images, views, the conditioner."""

    resolution: int = flag(512, "Side of the images in pixels.")
    pretrained_pipeline: str | None = flag(
        None, "DinoDiffusionPipeline to take frozen models from.", group="Frozen models"
    )
    revision: str | None = flag(None, "Revision of a pretrained model on the Hub.")
    variant: str | None = flag(None, "Its variant, such as fp16.")
    conditioner: str | None = flag(None, "Saved DinoImageConditioner.")
    encoder: list[str] | None = flag(None, "DINO encoder(s) to make a conditioner of.")
    tokens: Literal["global", "cls", "patch", "all"] | None = flag(None, "By default global, or --conditioner's.")
    projection_dim: int | None = flag(None, "Project the tokens of --encoder to this width.")
    normalize_tokens: int = flag(0, "Standardise tokens with statistics of this many training images; 0 does not.")
    cache_views: int = flag(
        0,
        "Encode this many views of each image once; 0 makes new ones each epoch. They stay in memory, or in "
        "--feature_cache.",
        group="Cached features",
    )
    cache_batch_size: int = flag(32, "Views encoded at once for --cache_views.")
    feature_cache: str | None = flag(None, "Folder that `diffusers-dino cache` makes: train on the views in it.")


@dataclass
class FeatureArguments(TokenArguments):
    """All that decides over the features that a UNet is trained on: tokens, and the autoencoder's latents."""

    pretrained_pipeline: str | None = flag(
        None, "DinoDiffusionPipeline to continue from; needed for LoRA.", group="Frozen models"
    )
    pretrained_model_name_or_path: str | None = flag(
        None, "Stable Diffusion to take VAE, denoiser and scheduler from.", group="Frozen models"
    )
    vae: str | None = flag(None, "VAE, in place of the pretrained model's.")


@dataclass
class RunArguments:
    """How long and how fast to learn, and what to keep of it."""

    train_batch_size: int = flag(16, "Images per device and forward pass.", group="Optimisation")
    gradient_accumulation_steps: int = flag(1, "Forward passes per update.")
    num_train_epochs: float = flag(100, "Length of training.")
    max_train_steps: int | None = flag(None, "Length of training in updates, in place of epochs.")
    learning_rate: float = flag(1e-3, "After warm-up.")
    lr_scheduler: str = flag("cosine", "One of diffusers', such as constant, cosine, linear.")
    lr_warmup_steps: int = flag(100, "Updates of warm-up.")
    adam_beta1: float = flag(0.9, "First moment's decay.")
    adam_beta2: float = flag(0.99, "Second moment's decay.")
    adam_weight_decay: float = flag(1e-2, "Weight decay, only of matrices and kernels.")
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "In place of accelerate's configuration.")
    output_dir: str = flag("outputs", "Where the model, checkpoints and train_log.jsonl go.", group="Output")
    checkpointing_steps: int = flag(500, "Updates between checkpoints; 0 writes none.")
    checkpointing_minutes: float = flag(0.0, "Minutes between checkpoints; 0 counts only updates.")
    checkpoints_total_limit: int | None = flag(None, "Keep only the newest checkpoints.")
    resume_from_checkpoint: str | None = flag(None, "A checkpoint, or `latest`: the newest complete one.")
    overwrite_output_dir: bool = flag(False, "Replace what another run left in --output_dir.")
    logging_steps: int = flag(50, "Updates between lines of progress where there is no terminal.")


@dataclass
class SharingArguments:
    """Where else a run and its result are shown."""

    push_to_hub: bool = flag(
        False, "Upload the result and its card, with the token of `hf auth login` or HF_TOKEN.", group="Output"
    )
    hub_model_id: str | None = flag(None, "Repository (private if new); by default named as --output_dir.")
    report_to: str | None = flag(None, "Tracker: tensorboard, wandb, or all that are installed.")
    tracker_project_name: str = flag("diffusers-dino", "Project name for the tracker.")


def open_training_images(
    args: ImageArguments, model: DiffusionPipeline | str | None = None, may_differ: bool = True
) -> data.ImageDataset:
    """Open what the flags name, prepared as for training the pipeline `model` that this training starts from.

    `may_differ` is whether other images than it knows are taken, with a warning: what is only an addition to it, such
    as a LoRA or a prior, cannot note others. Sets `args.remove_borders`, which cards and checkpoints tell.

    ValueError unless it is one local source or one data set of the Hub, or if the images must not differ.
    """
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("Give the images as --train_data_dir or as --dataset_name.")
    preprocessing = _preparation(args, model, may_differ)
    args.remove_borders = preprocessing.remove_borders
    images = data.open_images(
        args.train_data_dir or args.dataset_name,
        preprocessing,
        split=args.dataset_split,
        image_column=args.image_column,
        config_name=args.dataset_config_name,
        local_files_only=args.dataset_name is None,
        in_memory=args.in_memory and not getattr(args, "feature_cache", None),  # which hardly reads an image
        max_unreadable=args.max_unreadable,
    )
    if args.keys_file:
        images = images.select(read_keys(args.keys_file))
    return images.select(images.keys[: args.max_train_samples]) if args.max_train_samples else images


def _preparation(args: ImageArguments, model: DiffusionPipeline | str | None, may_differ: bool) -> data.Preprocessing:
    stored = None if model is None else stored_preparation(model, getattr(args, "revision", None))
    if stored is None:
        if model is not None and args.remove_borders is None:
            logger.warning(
                "The model that this starts from is of an older version and does not say whether borders were cut "
                "off its images: they are. Give --remove_borders to choose."
            )
        return data.Preprocessing(args.resolution, args.remove_borders is not False)
    if may_differ and args.remove_borders not in (None, stored.remove_borders):
        logger.warning(
            f"The model was trained with --remove_borders {stored.remove_borders}, and is trained on with "
            f"{args.remove_borders}."
        )
        return replace(stored, size=args.resolution, remove_borders=args.remove_borders)
    return preparation_for(stored, args.resolution, args.remove_borders)


def split_off_unseen(
    args: Any, images: data.ImageDataset, count: int, share: float = 0.05
) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Images to train on, and images to look at and to measure on.

    The latter are `--validation_data_dir`, or the split `validation` of a folder of shards. Without either, about
    `count` are held out, at most a `share`, patient by patient where shards say whose an image is, else from the end
    of the names, in whose order a patient's images are together. With a `count` of 0 they are the training images.
    """
    if args.validation_data_dir:
        return images, open_unseen(args, args.validation_data_dir, images)
    if not count:
        return images, images
    if "validation" in _splits_of(args.train_data_dir) and args.dataset_split == "train":
        unseen = open_unseen(args, args.train_data_dir, images, "validation")
        logger.info(f"Measuring on the {len(unseen)} images of the shards' own split, validation.")
        return images, unseen
    groups: dict[str, list[str]] = {}
    for patient, key in zip(patients_of(images), images.keys, strict=True):
        groups.setdefault(patient, []).append(key)
    wanted = min(count, max(2, round(share * len(images))))
    held: list[str] = []
    patients = 0
    for patient in sorted(groups, reverse=True)[:-1]:
        if len(held) < wanted:
            held, patients = held + groups[patient], patients + 1
    if len(held) < min(2, wanted):
        raise ValueError(
            f"{len(images)} images of {len(groups)} patients are too few to hold some out to measure on: give "
            "unseen images as --validation_data_dir."
        )
    logger.info(
        f"Held out of training to measure on: {len(held)} of {len(images)} images, by patient ({patients} of "
        f"{len(groups)}). For others, give --validation_data_dir."
    )
    unseen = set(held)
    return images.select([key for key in images.keys if key not in unseen]), images.select(held)


def open_unseen(args: Any, source: str, images: data.ImageDataset, split: str = "train") -> data.ImageDataset:
    """Other images than those of training, opened as they are."""
    return data.open_images(
        source,
        images.preprocessing,
        split=split,
        image_column=args.image_column,
        max_unreadable=args.max_unreadable,
        local_files_only=args.dataset_name is None,
    )


def _splits_of(source: str | None) -> set[str]:
    """The splits of a folder of shards; none for other sources."""
    try:
        return {shard["split"] for shard in read_manifest(source)["shards"]} if source else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def patients_of(images: data.ImageDataset) -> list[str]:
    """Whose each image is: as the shards say, else the beginning of its name that is common to several."""
    keys = images.keys
    try:
        return [patient_in(facts_beside(images, place)) or key for place, key in enumerate(keys)]
    except (KeyError, ValueError):
        depth = max(key.count("/") for key in keys)
        prefixes = [["/".join(key.split("/")[: n + 1]) for key in keys] for n in range(depth)]
        prefixes.append([re.sub(r"[/_-][^/_-]*$", "", key) for key in keys])
        return next((names for names in prefixes if len(set(names)) > 3), keys)


def make_augmentation(args: AugmentationArguments) -> data.Augmentation | None:
    if not args.augment:
        return None
    scale = args.min_scale, args.max_scale
    return settings_of(data.Augmentation, args, scale=scale, flip=0.5 * args.random_flip)


def open_views(args: FeatureArguments, may_differ: bool = True) -> data.TrainingViews:
    """Views of `open_training_images`."""
    images = open_training_images(args, args.pretrained_pipeline, may_differ)
    return data.TrainingViews(images, make_augmentation(args), args.seed)


def check_conditioner(args: TokenArguments) -> None:
    """Raise ValueError unless the flags name one source of the condition; forget what a pipeline decides."""
    if [args.pretrained_pipeline, args.conditioner, args.encoder].count(None) != 2:
        raise ValueError("Give one of --conditioner (a saved one), --encoder (to make one) and --pretrained_pipeline.")
    if args.conditioner and args.projection_dim:
        raise ValueError("--projection_dim is for a new conditioner: a saved --conditioner has its own.")
    if args.pretrained_pipeline:  # what it decides is not told as a flag
        defaults = type(args)()
        others = {name: getattr(defaults, name) for name in _OF_OTHER_MODELS if hasattr(args, name)}
        take_from_model(args, "--pretrained_pipeline", **others)


def take_from_model(args: Any, owner: str, **theirs: Any) -> None:
    """Set flags to what the model `owner` (a flag) has, for the card, and warn of those that say otherwise."""
    defaults = type(args)()
    for name, value in theirs.items():
        if getattr(args, name, value) not in (value, getattr(defaults, name, value)):
            logger.warning(f"--{name} changes nothing: {owner} has its own.")
        setattr(args, name, value)


def check_frozen_models(args: FeatureArguments) -> None:
    """Raise ValueError unless the flags name one VAE and one source of the condition; see `check_conditioner`."""
    check_conditioner(args)
    if not (args.vae or args.pretrained_model_name_or_path or args.pretrained_pipeline):
        raise ValueError("There is no VAE: give --vae, --pretrained_model_name_or_path or --pretrained_pipeline.")


def check_lora(args: Any) -> None:
    """Raise ValueError unless `--rank` and `--lora_alpha` describe a LoRA, or neither is given."""
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank must be at least 1, got {args.rank}: leave it out to train all weights.")
    if args.lora_alpha is not None and args.rank is None:
        raise ValueError("--lora_alpha is the scale of a LoRA: give --rank, too.")
    if args.lora_alpha is not None and args.lora_alpha <= 0:
        raise ValueError(f"--lora_alpha must be positive, got {args.lora_alpha}: leave it out to take the rank.")


def load_conditioner(args: TokenArguments, images: data.ImageDataset, device: torch.device) -> DinoImageConditioner:
    """The conditioner that the flags name, on the CPU; `device` computes the statistics of --normalize_tokens."""
    if args.pretrained_pipeline:
        return DinoImageConditioner.from_pretrained(
            args.pretrained_pipeline, subfolder="conditioner", revision=args.revision, variant=args.variant
        )
    if args.conditioner:
        conditioner = DinoImageConditioner.from_pretrained(args.conditioner).with_tokens(args.tokens)
    else:
        conditioner = DinoImageConditioner.from_encoder(
            args.encoder, tokens=args.tokens or "global", projection_dim=args.projection_dim
        )
    if args.normalize_tokens:
        conditioner.to(device).fit_normalization(evenly_spread(images, args.normalize_tokens))
    return conditioner.to("cpu")


def load_frozen(
    args: FeatureArguments, images: data.ImageDataset, device: torch.device
) -> tuple[VAE, DinoImageConditioner]:
    """The autoencoder and the conditioner that the flags name, on the CPU; see `load_conditioner`."""
    conditioner = load_conditioner(args, images, device)
    if args.vae:
        return load_vae(args.vae), conditioner
    whole = args.pretrained_pipeline or args.pretrained_model_name_or_path
    return load_vae(whole, revision=args.revision, variant=args.variant), conditioner
