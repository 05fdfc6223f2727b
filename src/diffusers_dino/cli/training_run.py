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
from ..training import checkpoints, objective
from ..training.features import Views
from ..training.interruption import Interruption
from ..training.optim import decay_matrices
from ..training.progress import Progress

__all__ = ["TrainingRun"]

logger = logging.getLogger(__name__)


class TrainingRun:
    """Gives the batches of each update, takes the optimizer's step, and saves: `for batches in run.updates(): ...`

    Args:
        args: The flags, which are `RunArguments` and `ImageArguments`.
        accelerator: Its `gradient_accumulation_steps` is the number of batches in an update.
        model: What is trained; may be a tuple of modules in one. Only matrices and kernels decay.
        views: What it is trained on: random views of images, or their features.
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
        args: Any,
        accelerator: Accelerator,
        model: nn.Module,
        views: Views,
        companions: tuple[Any, ...] = (),
    ) -> None:
        passes = accelerator.gradient_accumulation_steps
        self.images_per_update = args.train_batch_size * passes * accelerator.num_processes
        if self.images_per_update > len(views):
            raise ValueError(
                f"One update needs {self.images_per_update} images ({accelerator.num_processes} processes x "
                f"{args.train_batch_size} x {passes} forward passes), but there are {len(views)}. Lower "
                "--train_batch_size or --gradient_accumulation_steps."
            )
        self.args, self.accelerator = args, accelerator
        self.views = views
        self.total = args.max_train_steps or math.ceil(args.num_train_epochs * len(views) / self.images_per_update)
        self.step = 0
        self._position = 0  # images shown so far
        optimizer = torch.optim.AdamW(
            decay_matrices(model, args.adam_weight_decay),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=self.total
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler, *companions)
        self._provenance = checkpoints.describe_run(args.seed, views.images.preprocessing, args.shuffle_window_shards)
        if args.resume_from_checkpoint:
            found = checkpoints.resume_run(accelerator, args.output_dir, args.resume_from_checkpoint, self._provenance)
            if found is not None:
                self.step, self._position = found.step, found.info["position"]
            logger.info(f"Continuing from {found.path}" if found else "There is no checkpoint: starting anew")

    def updates(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of each update that is left; ends early, with a checkpoint, after SIGTERM or SIGUSR1.

        Yields:
            One batch for each forward pass; of each, `position` says where in the run its samples stand.
        """
        args, accelerator = self.args, self.accelerator
        sampler = data.GlobalBatchSampler(
            len(self.views),
            args.train_batch_size,
            args.seed,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            start=self._position,
            order=self.views.images.order(args.shuffle_window_shards),
        )
        batches = data.load_batches(self.views, sampler, args.dataloader_num_workers, accelerator.device)
        self.progress = Progress(
            accelerator,
            Path(args.output_dir, "train_log.jsonl"),
            self.total,
            start=self.step,
            images_per_step=self.images_per_update,
            every=args.logging_steps,
        )
        interruption = Interruption(args.checkpointing_minutes if accelerator.is_main_process else 0)
        stop = False
        while self.step < self.total and not stop:
            yield [next(batches) for _ in range(accelerator.gradient_accumulation_steps)]
            # What one process wishes, all do at the same update.
            wishes = torch.tensor(interruption.wishes(), device=accelerator.device)
            stop, due = accelerator.reduce(wishes, "mean").tolist()
            if stop or due or (args.checkpointing_steps and self.step % args.checkpointing_steps == 0):
                checkpoints.save_run(
                    accelerator,
                    args.output_dir,
                    self.step,
                    info={"position": self._position, **self._provenance},
                    keep=args.checkpoints_total_limit,
                )
                interruption.saved()
        self.progress.close()

    def update(self, losses: list[Tensor], keys: list[str]) -> None:
        """Take one step of the optimizer with the gradients that are there, after the `losses` of all forward passes.

        Raises:
            FloatingPointError: The loss or the gradient is not finite; the weights are untouched. It names `keys`.
        """
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        objective.check_finite(self.step + 1, loss, norm, keys, self.accelerator.mixed_precision)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.step, self._position = self.step + 1, self._position + self.images_per_update
        self.progress.update(loss, lr)
