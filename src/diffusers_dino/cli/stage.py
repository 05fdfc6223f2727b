"""What `train_vae.py` and `pretrain_dino.py` share: flags of the optimiser, checkpoints, one update."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from .. import data
from ..files import make_writable_folder
from ..training import checkpoints, objective
from ..training.interruption import Interruption
from ..training.progress import Progress
from .arguments import flag
from .image_flags import ImageArguments

logger = logging.getLogger("stage")


@dataclass
class StageArguments(ImageArguments):
    seed: int = flag(0, "Seed of everything random.", group="Optimisation")
    train_batch_size: int = flag(16, "Images per device and forward pass.")
    gradient_accumulation_steps: int = flag(1, "Forward passes per update.")
    num_train_epochs: float = flag(100, "Length of training.")
    max_train_steps: int | None = flag(None, "Length of training in updates, in place of epochs.")
    learning_rate: float = flag(1e-3, "After warm-up.")
    lr_scheduler: str = flag("cosine", "One of diffusers', such as constant, cosine, linear.")
    lr_warmup_steps: int = flag(100, "Updates of warm-up.")
    adam_beta1: float = flag(0.9, "First moment's decay.")
    adam_beta2: float = flag(0.99, "Second moment's decay.")
    adam_weight_decay: float = flag(1e-2, "Weight decay, of matrices and kernels alone.")
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "In place of accelerate's configuration.")
    output_dir: str = flag("stage", "Where the model, checkpoints and train_log.jsonl go.", group="Output")
    checkpointing_steps: int = flag(500, "Updates between checkpoints; 0 writes none.")
    checkpointing_minutes: float = flag(0.0, "Minutes between checkpoints; 0 goes by updates alone.")
    checkpoints_total_limit: int | None = flag(None, "Keep the newest checkpoints alone.")
    resume_from_checkpoint: str | None = flag(None, "A checkpoint, or `latest`: the newest complete one.")
    logging_steps: int = flag(50, "Updates between lines of progress where there is no terminal.")


def make_accelerator(args: StageArguments, log: logging.Logger) -> Accelerator:
    """Set up processes, precision, seed and logging, and note the arguments beside the result."""
    make_writable_folder(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    for chatty in (logger, log):
        chatty.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    if accelerator.is_main_process:
        Path(args.output_dir, "training_arguments.json").write_text(json.dumps(asdict(args), indent=1))
    return accelerator


class Stage:
    """Data order, optimizer and checkpoints of one run; the loss stays in the script.

    Args:
        args: The flags.
        accelerator: From `make_accelerator`.
        model: What is trained; may be a tuple of modules in one.
        images: What it is trained on.
        augmentation: Random views of the images, or None.
        companions: Further parts of the run's state (`state_dict`, `load_state_dict`), such as a teacher.

    Raises:
        ValueError: An update would need more images than there are.
    """

    def __init__(
        self,
        args: StageArguments,
        accelerator: Accelerator,
        model: nn.Module,
        images: data.ImageDataset,
        augmentation: data.Augmentation | None,
        companions: tuple[Any, ...] = (),
    ) -> None:
        self.args, self.accelerator, self.images, self.augmentation = args, accelerator, images, augmentation
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        if self.batch_size > len(images):
            raise ValueError(
                f"One update needs {self.batch_size} images ({accelerator.num_processes} processes x "
                f"{args.train_batch_size} x {args.gradient_accumulation_steps}), but there are {len(images)}. "
                "Lower --train_batch_size or --gradient_accumulation_steps."
            )
        self.total = args.max_train_steps or math.ceil(args.num_train_epochs * len(images) / self.batch_size)
        self.step = 0
        self._position = 0  # images shown so far
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.adam_weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas)
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=self.total
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler, *companions)
        self._provenance = checkpoints.describe_run(args.seed, images.preprocessing, args.shuffle_window_shards)
        if args.resume_from_checkpoint:
            self._resume(args.resume_from_checkpoint)

    def updates(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of each update that is left; ends early, with a checkpoint, after SIGTERM or SIGUSR1.

        Yields:
            `gradient_accumulation_steps` batches; of each, `position` says where in the run its samples stand.
        """
        args, accelerator = self.args, self.accelerator
        shares = accelerator.num_processes, accelerator.process_index
        order = self.images.order(args.shuffle_window_shards)
        sampler = data.GlobalBatchSampler(
            len(self.images), args.train_batch_size, args.seed, *shares, self._position, order=order
        )
        views = data.TrainingViews(self.images, self.augmentation, args.seed)
        batches = data.load_batches(views, sampler, args.dataloader_num_workers, accelerator.device)
        log_file = Path(args.output_dir, "train_log.jsonl")
        self.progress = Progress(accelerator, log_file, self.total, self.step, self.batch_size, args.logging_steps)
        interruption = Interruption(args.checkpointing_minutes if accelerator.is_main_process else 0)
        stop = False
        while self.step < self.total and not stop:
            yield [next(batches) for _ in range(args.gradient_accumulation_steps)]
            # What one process wishes, all do at the same update.
            wishes = torch.tensor(interruption.wishes(), device=accelerator.device)
            stop, due = accelerator.reduce(wishes, "mean").tolist()
            if stop or due or (args.checkpointing_steps and self.step % args.checkpointing_steps == 0):
                self.save()
                interruption.saved()
        self.progress.close()

    def update(self, losses: list[Tensor], keys: list[str]) -> float:
        """Take one step of the optimizer with the gradients that are there.

        Args:
            losses: The loss of each forward pass.
            keys: Samples to name if the loss is not finite.

        Returns:
            The mean loss over passes and processes.

        Raises:
            FloatingPointError: The loss or the gradient is not finite; the weights are untouched.
        """
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        objective.check_finite(self.step + 1, loss, norm, keys, self.accelerator.mixed_precision)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.step, self._position = self.step + 1, self._position + self.batch_size
        self.progress.update(loss, lr)
        return loss

    def save(self) -> None:
        """Write a checkpoint; every process must call this."""
        info = {"position": self._position, **self._provenance}
        keep = self.args.checkpoints_total_limit
        checkpoints.save_run(self.accelerator, self.args.output_dir, self.step, keep, **info)

    def _resume(self, name: str) -> None:
        found = checkpoints.resume_run(self.accelerator, self.args.output_dir, name, **self._provenance)
        if found is not None:
            self.step, self._position = found.step, found.info["position"]
        logger.info(f"Continuing from {found.path}" if found else "There is no checkpoint: starting anew")
