"""One training run on images: data order, optimizer, checkpoints and resuming. The loss stays in the script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..training.features import FeatureEncoder, Views
from ..training.optim import decay_matrices
from ..training.state import ModelState
from ..training.tally import Tally
from .run import Run

__all__ = ["TrainingRun"]


class TrainingRun:
    """Gives the batches of each update, takes the optimizer's step, and saves: `for batches in run.updates(): ...`

    Args:
        run: Of `open_run`; its flags are `RunArguments` and `ImageArguments`.
        model: What is trained; may be a tuple of modules in one. Only matrices and kernels decay.
        views: What it is trained on: random views of images, or their features.
        encode: Frozen models that encode each batch, which a GPU does ahead of training.
        companions: Further parts of the run's state, such as a teacher.
        settings: What else must be the same when the run goes on.

    Attributes:
        model: The prepared model.
        step, total: Updates done so far, and of the whole run.
        finished: Whether all of them are done.

    Raises:
        ValueError: An update would need more images than there are.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        views: Views,
        companions: tuple[nn.Module, ...] = (),
        encode: FeatureEncoder | None = None,
        **settings: Any,
    ) -> None:
        args, accelerator = run.args, run.accelerator
        passes = args.gradient_accumulation_steps
        if run.images_per_update > len(views):
            raise ValueError(
                f"One update needs {run.images_per_update} images ({accelerator.num_processes} processes x "
                f"{args.train_batch_size} x {passes} forward passes), but there are {len(views)}. Lower "
                "--train_batch_size or --gradient_accumulation_steps."
            )
        run.begin(views.images, **settings)
        self.run, self.args, self.accelerator = run, args, accelerator
        self.views, self._encode = views, encode
        self.total = run.count_updates(len(views))
        optimizer = torch.optim.AdamW(
            decay_matrices(model, args.adam_weight_decay),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            fused=accelerator.device.type == "cuda" or None,  # elsewhere the bits stay what they were
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=self.total
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._state = ModelState(model, self.optimizer, self.lr_scheduler, companions)
        self.step, self._position = run.resume(self._state)  # updates so far, and images shown
        self._tally = Tally(accelerator, self.optimizer, run.interruption)

    @property
    def finished(self) -> bool:
        return self.step >= self.total  # more, where a shorter run is asked for on resuming

    def updates(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of each update that is left; ends early, with a checkpoint, after SIGTERM or SIGUSR1.

        Yields:
            One batch for each forward pass; of each, `position` says where in the run its samples stand.
        """
        batches = self.run.load_batches(self.views, self._position, self._encode)
        self.progress = self.run.open_progress(self.step, self.total)
        while not (self.finished or self._tally.stop):
            yield [next(batches) for _ in range(self.accelerator.gradient_accumulation_steps)]
            if self._tally.stop or self._tally.save or self._is_checkpoint(self.step):
                self.run.save(self._state, self.step, self._position)
        self.progress.close()
        if not self.finished:
            self.run.say_stopped(self.step)

    def update(self, losses: list[Tensor], keys: list[str]) -> None:
        """Take one step of the optimizer with the gradients that are there, after the `losses` of all forward passes.

        Raises:
            FloatingPointError: The loss or the gradient is not finite; the weights are untouched. It names `keys`.
        """
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.step, self._position = self.step + 1, self._position + self.run.images_per_update
        at_once = self._is_checkpoint(self.step) or self.step == self.total
        known = self._tally.note(self.step, torch.stack(losses).mean(), norm, lr, keys, at_once)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        for update in known:
            self.progress.update(update.loss, update.lr)

    def write_card(self, *base_models: str | None) -> None:
        """`Run.write_card` of the finished model; `base_models` are what it was made from, or None."""
        self.run.write_card(len(self.views.images), self.step, base_models)

    def _is_checkpoint(self, step: int) -> bool:
        return self.args.checkpointing_steps > 0 and step % self.args.checkpointing_steps == 0
