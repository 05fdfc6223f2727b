"""Distil a large DINO encoder into a small one on unlabelled images, for models that must be small or fast.

    accelerate launch examples/distill_encoder.py examples/configs/showcase_encoder.yaml \
        --train_data_dir /data/cxr --teacher facebook/dinov2-small --output_dir outputs/encoder

The small vision transformer learns to predict the large one's class token and patch tokens, each through a linear
layer of its own that is thrown away afterwards. Its n x n registers learn the means of the patch tokens over n x n
regions, so that all global tokens together say what is in an image and roughly where. `--output_dir` becomes a
`DinoImageConditioner`. The teacher runs once for each of `--cache_views` views of an image, kept on disk.
"""

from __future__ import annotations

if __name__ == "__main__":
    import diffusers_dino.cli.early  # noqa: F401  (first: signals and readers that leave are minded from here on)

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Dinov2WithRegistersModel

from diffusers_dino import DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.new_encoder import NewEncoderArguments, new_encoder_config, save_as_conditioner
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
from diffusers_dino.data import ImageDataset, Slot, TrainingViews, collate
from diffusers_dino.files import make_writable_folder
from diffusers_dino.fingerprints import fingerprint_model
from diffusers_dino.training.feature_cache import Recipe, open_feature_cache, write_feature_cache
from diffusers_dino.training.features import CachedViews, FeatureEncoder, evenly_spread

logger = logging.getLogger("distill_encoder")

PARTS = ("class token", "registers", "patches")


@dataclass
class Arguments(RunArguments, NewEncoderArguments, AugmentationArguments, ImageArguments):
    teacher: str | None = flag(None, "Encoder to distil: Hub id or folder of a ViT.", group="Encoders")
    teacher_size: int | None = flag(None, "Side of the images that it sees; its own by default.")
    cache_views: int = flag(1, "Views of each image that the teacher sees.")
    cache_batch_size: int = flag(32, "Views that it sees at once.")
    hidden_size: int = flag(128, "Width of the small encoder's tokens.")
    num_hidden_layers: int = flag(6, "Its transformer layers.")
    num_attention_heads: int = flag(4, "Heads per layer.")
    num_register_tokens: int = flag(4, "Registers, a square number: with the class token, the condition.")
    validation_data_dir: str | None = flag(
        None, "Unseen images; else some of --train_data_dir are held out.", group="Validation"
    )
    num_validation_images: int = flag(128, "Images to measure on.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    with open_run(args, logger) as run:
        train(args, run)


def train(args: Arguments, opened: Run) -> None:
    accelerator = opened.accelerator
    side = regions_of(args)
    images, unseen = split_off_unseen(args, open_training_images(args), args.num_validation_images)
    unseen = unseen.select(unseen.keys[: args.num_validation_images])
    teacher = open_teacher(args, images, accelerator.device)
    network = StudentNetwork(make_student(args), teacher.token_dim, args.pixel_mean, args.pixel_std)
    views = TrainingViews(images, make_augmentation(args), args.seed)
    begun = {"config": network.encoder.config.to_diff_dict(), "teacher": fingerprint_model(teacher)}
    begun["pixels"] = [args.pixel_mean, args.pixel_std]
    run = TrainingRun(opened, network, ViewsWithTargets(views, args.cache_views), encoder=begun)
    run.views.targets = teach(args, views, teacher, opened)
    region_scale = scale_of_regions(run.views.targets, side).to(accelerator.device)
    logger.info(
        f"Training {sum(p.numel() for p in network.encoder.parameters()) / 1e6:.2f} M weights on {len(images)} "
        f"images, {len(unseen)} held out: {run.total} updates of {opened.images_per_update} images"
    )
    for batches in run.updates():
        losses = []
        for batch in batches:
            pixels = batch["image"].to(accelerator.device, non_blocking=True)
            targets = arrange(batch["tokens"].to(accelerator.device).float(), side, region_scale, network.grid(pixels))
            with accelerator.accumulate(run.model):
                pairs = zip(run.model(pixels), targets, strict=True)  # without registers, there are no regions
                loss = sum(F.mse_loss(made, wanted) for made, wanted in pairs if wanted.numel())
                accelerator.backward(loss)
            losses.append(loss.detach())
        run.update(losses, batches[-1]["key"])
    if run.finished and accelerator.is_main_process:
        explained = explained_variance(args, network.eval(), teacher, unseen, region_scale)
        shares = ", ".join(f"{share:.2f} of the {part}" for part, share in explained.items())
        logger.info(f"Of the teacher's variance on {len(unseen)} images to look at, the student explains {shares}")
        Path(args.output_dir, "explained_variance.json").write_text(json.dumps(explained, indent=1))
        save_as_conditioner(args, network.encoder, images, args.resolution)
        run.write_card(args.teacher)
    accelerator.end_training()


class StudentNetwork(nn.Module):
    """A small encoder, and linear layers from its tokens to the teacher's. `mean` and `std` standardise pixels."""

    def __init__(self, encoder: Dinov2WithRegistersModel, teacher_width: int, mean: float, std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, teacher_width) for _ in PARTS)
        self.mean, self.std = mean, std

    def grid(self, pixels: Tensor) -> int:
        """How many patches are side by side."""
        return pixels.shape[-1] // self.encoder.config.patch_size

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """`(B, 1 or 3, H, W)` in [0, 1] -> a guess at the teacher's class token `(B, 1, D)`, regions and patches."""
        pixel_values = ((pixels - self.mean) / self.std).expand(-1, 3, -1, -1)
        tokens = self.encoder(pixel_values).last_hidden_state  # (B, 1 + registers + patches, width); CLS first
        registers = self.encoder.config.num_register_tokens
        parts = tokens.split([1, registers, tokens.shape[1] - 1 - registers], dim=1)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]


class ViewsWithTargets(Dataset[dict[str, Any]]):
    """Views and what the teacher says of them. In epoch e the view is that of epoch `e % num_views`."""

    targets: CachedViews

    def __init__(self, views: TrainingViews, num_views: int) -> None:
        self.views, self.images, self.num_views = views, views.images, num_views

    def __len__(self) -> int:
        return len(self.views)

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """A whole batch: `image`, `key` and `position` as of `TrainingViews`, and `tokens` `(B, S, D)`."""
        batch = self.views.__getitems__([slot._replace(epoch=slot.epoch % self.num_views) for slot in slots])
        return {**batch, "tokens": self.targets.__getitems__(slots)["features"][-1]}


def regions_of(args: Arguments) -> int:
    side = math.isqrt(args.num_register_tokens)
    if side**2 != args.num_register_tokens:
        raise ValueError(f"--num_register_tokens {args.num_register_tokens} is not a square number (0, 1, 4, 9).")
    if args.resolution % args.patch_size:
        raise ValueError(f"--resolution {args.resolution} is not a multiple of --patch_size {args.patch_size}.")
    if not args.teacher:
        raise ValueError("Name the encoder to distil as --teacher.")
    for name, fewest in (("cache_views", 1), ("cache_batch_size", 1), ("num_validation_images", 2)):
        if getattr(args, name) < fewest:
            raise ValueError(f"--{name} must be at least {fewest}, got {getattr(args, name)}.")
    return side


def make_student(args: Arguments) -> Dinov2WithRegistersModel:
    model = Dinov2WithRegistersModel(new_encoder_config(args, args.resolution))
    model.embeddings.mask_token.requires_grad_(False)  # no patch is masked; it would wait for a gradient
    return model


def open_teacher(args: Arguments, images: ImageDataset, device: torch.device) -> DinoImageConditioner:
    """All tokens of the teacher, standardised, so that each channel counts the same."""
    teacher = DinoImageConditioner.from_encoder(args.teacher, tokens="all", size=args.teacher_size).to(device)
    if teacher.heads[0].num_global < 1:
        raise ValueError(f"{args.teacher} has no class token to learn from.")
    teacher.fit_normalization(evenly_spread(images, min(256, args.num_statistics_images)), slot_offset=0.0)
    return teacher


def teach(args: Arguments, views: TrainingViews, teacher: DinoImageConditioner, opened: Run) -> CachedViews:
    """What the teacher says of all views, from `--output_dir`/teacher, where it is written if it is not there."""
    accelerator, folder = opened.accelerator, make_writable_folder(Path(args.output_dir, "teacher"))
    if args.overwrite_output_dir and not args.resume_from_checkpoint and accelerator.is_main_process:
        shutil.rmtree(folder)  # of the run that is replaced
        folder.mkdir()
    accelerator.wait_for_everyone()
    recipe = Recipe.of(None, teacher, views, args.cache_views)
    write_feature_cache(
        folder,
        recipe,
        views,
        FeatureEncoder(None, teacher, accelerator.device),
        accelerator,
        batch_size=args.cache_batch_size,
        num_workers=args.dataloader_num_workers,
        say=logger.info,
    )
    return open_feature_cache(folder, recipe, views.images)


def scale_of_regions(targets: CachedViews, side: int) -> Tensor:
    """Mean and standard deviation `(2, side^2, D)` of the regions' tokens over some images."""
    if not side:
        return torch.zeros(2, 0, 1)
    places = range(0, len(targets), max(1, len(targets) // 512))
    tokens = targets.__getitems__([Slot(0, 0, place) for place in places])["features"][-1].float()
    return torch.stack([*reversed(torch.std_mean(pool(tokens, side), dim=0))])


def pool(tokens: Tensor, side: int) -> Tensor:
    """Means of the patch tokens over `side` x `side` regions: `(B, S, D)`, patches last -> `(B, side^2, D)`."""
    grid = math.isqrt(tokens.shape[1])
    patches = tokens[:, -(grid**2) :].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (B, D, grid, grid)
    return F.adaptive_avg_pool2d(patches, side).flatten(2).transpose(1, 2)


def arrange(tokens: Tensor, side: int, region_scale: Tensor, grid: int) -> list[Tensor]:
    """What the student shall predict, from all of the teacher's tokens `(B, S, D)`."""
    mean, std = region_scale
    regions = (pool(tokens, side) - mean) / std if side else tokens[:, :0]
    return [tokens[:, :1], regions, pool(tokens, grid)]


@torch.no_grad()
def explained_variance(
    args: Arguments, network: StudentNetwork, teacher: DinoImageConditioner, unseen: ImageDataset, region_scale: Tensor
) -> dict[str, float]:
    """The share of the teacher's variance over images, and places, that the student explains (R squared)."""
    device, side = teacher.device, math.isqrt(args.num_register_tokens)
    predicted, expected = [], []
    for first in range(0, len(unseen), args.cache_batch_size):
        places = range(first, min(first + args.cache_batch_size, len(unseen)))
        pixels = collate([unseen[place] for place in places])["image"].to(device)
        predicted.append(network(pixels))
        expected.append(arrange(teacher.encode(pixels).float(), side, region_scale, network.grid(pixels)))
    shares = {}
    for name, ours, theirs in zip(PARTS, zip(*predicted, strict=True), zip(*expected, strict=True), strict=True):
        ours, theirs = torch.cat(ours), torch.cat(theirs)
        if theirs.numel():
            shares[name] = 1 - ((ours - theirs).square().mean() / (theirs - theirs.mean(0)).square().mean()).item()
    return shares


if __name__ == "__main__":
    main()
