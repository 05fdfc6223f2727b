"""When the host and the processes of a run learn how its updates went: not at each one, which would cost time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..devices import send
from .interruption import Interruption
from .objective import check_finite

__all__ = ["Tally"]

_EVERY_ON_A_GPU = 10
_SECONDS = 10.0  # between exchanges at most, as a batch system does not wait long for a run to stop


class Update(NamedTuple):
    """An update as the log tells it: its number, the mean loss over all processes, and the learning rate."""

    step: int
    loss: float
    lr: float


class Tally:
    """Notes the loss of each update on the device, and exchanges it between processes and host every few updates.

    Whoever reads a number off a GPU waits until the GPU has done all that it was given, and then has it wait. An
    exchange also tells all processes whether one of them wishes to stop or to save, so that they do it together.

    An update whose loss or gradient is not finite changes no weight. Where it is not exchanged before the optimizer's
    step, that step and all after it are left out on the device, until the next exchange raises. Only PyTorch's fused
    optimizers can do that: with others, and with fp16, whose scaler uses the same means, each update is exchanged.

    Args:
        accelerator: Of the run.
        optimizer: As `accelerator` has prepared it.
        interruption: Wishes of this process.
        every: Most updates from one exchange to the next, which come at least every ten seconds; by default 10 on a
            GPU, and 1 elsewhere, where nothing is gained.

    Attributes:
        stop: Whether a process wished to stop, at the last exchange.
        save: Whether one wished to save.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        interruption: Interruption,
        every: int | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"Updates must be exchanged every 1 or more of them, got {every}.")
        self.stop = self.save = False
        self._accelerator, self._interruption = accelerator, interruption
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # which accelerate wraps
        can_skip = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        if accelerator.mixed_precision == "fp16" or not can_skip:
            every = 1
        self._every = every or (_EVERY_ON_A_GPU if accelerator.device.type == "cuda" else 1)
        self._noted: list[tuple[int, Tensor, Tensor, float, Sequence[str]]] = []
        self._until_exchange = 1
        self._exchanged_at = time.monotonic()

    def note(
        self, step: int, loss: Tensor, norm: Tensor, lr: float, keys: Sequence[str], at_once: bool = False
    ) -> list[Update]:
        """Note an update between the clipping of its gradient and the step of the optimizer.

        Args:
            step: Its number, from 1.
            loss: Of this process, on the device.
            norm: Of the gradient, on the device.
            lr: Learning rate.
            keys: Images that it was made from, for an error to name.
            at_once: Whether to exchange it now, as it must be before a checkpoint and at the end.

        Returns:
            The updates since the last exchange, with this one; none if there was no exchange.

        Raises:
            FloatingPointError: At an exchange, if the loss or the gradient of one of them was not finite.
        """
        self.save = False  # a wish is of one exchange
        self._noted.append((step, loss.detach(), torch.as_tensor(norm, device=loss.device), lr, keys))
        if not at_once and len(self._noted) < self._until_exchange:
            before = self._optimizer.found_inf if len(self._noted) > 1 else None
            broken = (~(loss.detach() + norm).isfinite()).float()
            self._optimizer.found_inf = broken if before is None else torch.maximum(before, broken)
            return []
        if self._every > 1:
            self._optimizer.found_inf = None
        return self._exchange()

    def _exchange(self) -> list[Update]:
        steps, losses, norms, rates, keys = zip(*self._noted, strict=True)
        count, seconds = len(steps), (time.monotonic() - self._exchanged_at) / len(steps)
        wishes = send(torch.tensor([*self._interruption.wishes(), seconds]), losses[0].device)
        noted = torch.cat([torch.stack(losses), torch.stack(norms).float(), wishes])
        told = self._accelerator.reduce(noted, "mean").tolist()
        stop, save, seconds = told[2 * count :]
        self.stop, self.save = bool(stop), bool(save)
        self._until_exchange = max(1, min(self._every, int(_SECONDS / max(seconds, 1e-6))))
        self._exchanged_at = time.monotonic()
        self._noted.clear()
        updates = [Update(*update) for update in zip(steps, told, rates, strict=False)]
        for update, norm, of in zip(updates, told[count:], keys, strict=False):
            check_finite(update.step, update.loss, norm, of, self._accelerator.mixed_precision)
        return updates
