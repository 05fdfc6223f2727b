"""One training run on images: data order, optimizer, checkpoints and resuming. The loss stays in the script."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from .. import data
from . import checkpoints, objective
from .interruption import Interruption
from .optim import decay_matrices
from .progress import Progress

__all__ = ["TrainingRun"]

logger = logging.getLogger(__name__)


class TrainingRun:
    """Gives the batches of each update, takes the optimizer's step, and saves: `for batches in run.updates(): ...`

    Args:
        accelerator: Its `gradient_accumulation_steps` is the number of batches in an update.
        model: What is trained; may be a tuple of modules in one.
        images: What it is trained on.
        augmentation: Random views of the images, or None.
        output_dir: Where checkpoints and `train_log.jsonl` go.
        seed: Seed of the order and of the views.
        batch_size: Images per process and forward pass.
        num_epochs, max_steps: Length of training; in updates if `max_steps` is given.
        learning_rate, betas, weight_decay: Of AdamW. Only matrices and kernels decay.
        lr_schedule, warmup_steps: As in `diffusers.optimization.get_scheduler`.
        max_grad_norm: Gradients are clipped to this norm.
        shuffle_window_shards: Shards that the shuffle mixes at a time; 0 for all.
        num_workers: Processes that load data.
        checkpointing_steps, checkpointing_minutes: Updates and minutes between checkpoints; 0 does not count them.
        keep_checkpoints: How many to keep; None keeps all.
        resume_from: A checkpoint, as in `checkpoints.find_checkpoint`; None starts anew.
        logging_steps: Updates between lines of progress.
        companions: Further parts of the run's state (`state_dict`, `load_state_dict`), such as a teacher.

    Attributes:
        model: The prepared model.
        step, total: Updates done so far, and of the whole run.
        images_per_update: Over all processes and accumulated batches.

    Raises:
        ValueError: An update would need more images than there are.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        images: data.ImageDataset,
        augmentation: data.Augmentation | None = None,
        *,
        output_dir: str | Path,
        seed: int = 0,
        batch_size: int = 16,
        num_epochs: float = 100,
        max_steps: int | None = None,
        learning_rate: float = 1e-3,
        lr_schedule: str = "cosine",
        warmup_steps: int = 100,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        shuffle_window_shards: int = 0,
        num_workers: int = 0,
        checkpointing_steps: int = 500,
        checkpointing_minutes: float = 0.0,
        keep_checkpoints: int | None = None,
        resume_from: str | None = None,
        logging_steps: int = 50,
        companions: tuple[Any, ...] = (),
    ) -> None:
        passes = accelerator.gradient_accumulation_steps
        self.images_per_update = batch_size * passes * accelerator.num_processes
        if self.images_per_update > len(images):
            raise ValueError(
                f"One update needs {self.images_per_update} images ({accelerator.num_processes} processes x "
                f"{batch_size} x {passes} forward passes), but there are {len(images)}. Lower the batch size or the "
                "number of accumulated passes."
            )
        self.accelerator, self.images, self.output_dir = accelerator, images, Path(output_dir)
        self.batch_size, self.max_grad_norm, self.num_workers = batch_size, max_grad_norm, num_workers
        self.checkpointing_steps, self.checkpointing_minutes = checkpointing_steps, checkpointing_minutes
        self.keep_checkpoints, self.logging_steps = keep_checkpoints, logging_steps
        self.views = data.TrainingViews(images, augmentation, seed)
        self.order = images.order(shuffle_window_shards)
        self.total = max_steps or math.ceil(num_epochs * len(images) / self.images_per_update)
        self.step = 0
        self._position = 0  # images shown so far
        optimizer = torch.optim.AdamW(decay_matrices(model, weight_decay), lr=learning_rate, betas=betas)
        self.lr_scheduler = get_scheduler(
            lr_schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=self.total
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler, *companions)
        self._provenance = checkpoints.describe_run(seed, images.preprocessing, shuffle_window_shards)
        if resume_from:
            found = checkpoints.resume_run(accelerator, self.output_dir, resume_from, self._provenance)
            if found is not None:
                self.step, self._position = found.step, found.info["position"]
            logger.info(f"Continuing from {found.path}" if found else "There is no checkpoint: starting anew")

    def updates(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of each update that is left; ends early, with a checkpoint, after SIGTERM or SIGUSR1.

        Yields:
            One batch for each forward pass; of each, `position` says where in the run its samples stand.
        """
        accelerator = self.accelerator
        sampler = data.GlobalBatchSampler(
            len(self.images),
            self.batch_size,
            self.views.seed,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            start=self._position,
            order=self.order,
        )
        batches = data.load_batches(self.views, sampler, self.num_workers, accelerator.device)
        self.progress = Progress(
            accelerator,
            self.output_dir / "train_log.jsonl",
            self.total,
            start=self.step,
            images_per_step=self.images_per_update,
            every=self.logging_steps,
        )
        interruption = Interruption(self.checkpointing_minutes if accelerator.is_main_process else 0)
        stop = False
        while self.step < self.total and not stop:
            yield [next(batches) for _ in range(accelerator.gradient_accumulation_steps)]
            # What one process wishes, all do at the same update.
            wishes = torch.tensor(interruption.wishes(), device=accelerator.device)
            stop, due = accelerator.reduce(wishes, "mean").tolist()
            if stop or due or (self.checkpointing_steps and self.step % self.checkpointing_steps == 0):
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
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        objective.check_finite(self.step + 1, loss, norm, keys, self.accelerator.mixed_precision)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.step, self._position = self.step + 1, self._position + self.images_per_update
        self.progress.update(loss, lr)
        return loss

    def save(self) -> None:
        """Write a checkpoint; every process must call this."""
        info = {"position": self._position, **self._provenance}
        checkpoints.save_run(self.accelerator, self.output_dir, self.step, info=info, keep=self.keep_checkpoints)
