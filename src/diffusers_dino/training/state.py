"""What a run must remember to continue: weights, their average, optimizer, schedule, scaler and random states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..prior import DinoPrior
from .checkpoints import CheckpointError

__all__ = ["TrainingState"]


class TrainingState:
    """What is trained, and how `checkpoints.save_run` and `checkpoints.resume_run` write and read it.

    A checkpoint holds `unet/` (or `pytorch_lora_weights.safetensors`), which is what a user samples from: the
    averaged weights where there is an average. What only resuming needs lies beside it.

    Args:
        accelerator: Prepares the UNet and the optimizer.
        unet: The parameters that require gradients are the ones that are saved.
        optimizer: Of these parameters.
        lr_scheduler: Stepped once an update, whatever the number of processes.
        ema_decay: Decay of the moving average of the weights, or None for no average.
        lora: Whether the trained parameters are a LoRA adapter.
        folder: What the model's folder is called in a checkpoint.

    Attributes:
        model: What to train: the UNet, wrapped for several processes and mixed precision.
        trainable: The trained parameters by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        unet: UNet2DConditionModel | DinoPrior,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema_decay: float | None = None,
        lora: bool = False,
        folder: str = "unet",
    ) -> None:
        self.accelerator = accelerator
        self.unet = unet
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.lora, self.folder = lora, folder
        self.trainable: dict[str, Tensor] = {n: p for n, p in unet.named_parameters() if p.requires_grad}
        self.ema: EMAModel | None = None
        if ema_decay is not None:
            self.ema = EMAModel(self.trainable.values(), decay=ema_decay, foreach=True)
        self.lr_scheduler = lr_scheduler
        accelerator.register_for_checkpointing(self)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def update_average(self) -> None:
        """Count the current weights into the average; call it after each update."""
        if self.ema is not None:
            self.ema.step(self.trainable.values())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the UNet holds the averaged weights, if there is an average, and is in evaluation mode."""
        training = self.unet.training
        parameters = list(self.trainable.values())
        kept = [p.detach().to("cpu", copy=True) for p in parameters] if self.ema is not None else []
        if self.ema is not None:
            self.ema.copy_to(parameters)
        self.unet.eval()
        try:
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=False):
                parameter.data.copy_(value)
            self.unet.train(training)

    def save_for_use(self, folder: str | Path) -> None:
        """Write what a user samples from: `unet/`, or LoRA weights that `load_lora_weights` reads."""
        with self.averaged_weights():
            if self.lora:
                from peft import get_peft_model_state_dict

                layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
                StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
            else:
                self.unet.save_pretrained(Path(folder) / self.folder, max_shard_size="1TB")

    def state_dict(self) -> dict[str, Any]:
        """The part that is not weights, for accelerate."""
        return {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_step": self.ema.optimization_step if self.ema is not None else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]

    def _save_weights(self, models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # accelerate would save them once more
        if not self.accelerator.is_main_process:
            return
        self.save_for_use(folder)
        raw, average = self._weight_files(folder)
        if not raw.exists():
            save_file({name: p.detach().contiguous() for name, p in self.trainable.items()}, raw)
        if self.ema is not None and not average.exists():
            save_file({name: p.contiguous() for name, p in self._average().items()}, average)

    @torch.no_grad()
    def _load_weights(self, models: list[Any], folder: str) -> None:
        models.clear()  # accelerate would look for files of its own
        raw, average = self._weight_files(folder)
        _copy_by_name(raw, self.trainable)
        if self.ema is not None:
            _copy_by_name(average, self._average())

    def _average(self) -> dict[str, Tensor]:
        return dict(zip(self.trainable, self.ema.shadow_params, strict=True))

    def _weight_files(self, folder: str) -> tuple[Path, Path]:
        """Where a checkpoint keeps the trained weights and their average: `unet/` serves as one of them if it can."""
        usable = Path(folder) / self.folder / SAFETENSORS_WEIGHTS_NAME
        raw, average = Path(folder) / "trainable.safetensors", Path(folder) / "average.safetensors"
        if self.lora:
            return raw, average
        return (raw, usable) if self.ema is not None else (usable, average)


def _copy_by_name(file: Path, targets: dict[str, Tensor]) -> None:
    if not file.is_file():
        raise CheckpointError(
            f"The checkpoint lacks {file.name}: its run had another setting of averaged weights, or of a LoRA."
        )
    tensors = load_file(file)
    if not targets.keys() <= tensors.keys() or any(tensors[n].shape != t.shape for n, t in targets.items()):
        raise CheckpointError(f"{file} holds the weights of another model: the UNet or the rank has changed.")
    for name, target in targets.items():
        target.copy_(tensors[name])
