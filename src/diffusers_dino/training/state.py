"""What a run must remember to continue: weights, their average, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from ..fusion import TokenFusion
from ..pipelines.lora import save_adapter
from .checkpoints import CheckpointError, read_pickle
from .plain_state import OPTIMIZER, load_optimizer, read_state, save_optimizer

__all__ = ["ModelState", "TrainingState"]

_FUSION = "fusion."  # begins the names of a fusion's weights among the trained ones


class TrainingState:
    """What is trained, and how `checkpoints.save_run` and `checkpoints.load_run` write and read it.

    A checkpoint holds `unet/` or `transformer/` (or `pytorch_lora_weights.safetensors`), and `fusion/` if one is
    trained, which is what a user samples from: the averaged weights where there is an average. What only resuming
    needs lies beside it.

    Args:
        accelerator: Prepares the model and the optimizer.
        denoiser: The parameters that require gradients are the ones that are saved.
        optimizer: Of these parameters.
        lr_scheduler: Stepped once an update, whatever the number of processes.
        ema_decay: Decay of the moving average of the weights, or None for no average.
        lora: Whether the trained parameters are a LoRA adapter.
        folder: What the model's folder is called in a checkpoint.
        fusion: Trained with the UNet, unless it is frozen.

    Attributes:
        model: What to train, wrapped for several processes and mixed precision.
        fusion: The fusion, likewise, or None.
        trainable: The trained parameters by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        denoiser: ModelMixin,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema_decay: float | None = None,
        lora: bool = False,
        folder: str = "unet",
        fusion: TokenFusion | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.denoiser = denoiser
        self.model, self.optimizer = accelerator.prepare(denoiser, optimizer)
        self.lora, self.folder, self.fusion = lora, folder, fusion
        self.trainable: dict[str, Tensor] = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
        self._saved = {folder: denoiser}
        if fusion is not None and fusion.type_embeddings.requires_grad:
            self.fusion = accelerator.prepare(fusion)
            self._saved["fusion"] = fusion
            self.trainable |= {f"{_FUSION}{n}": p for n, p in fusion.named_parameters()}
        self.ema: EMAModel | None = None
        if ema_decay is not None:
            self.ema = EMAModel(self.trainable.values(), decay=ema_decay, foreach=True)
        self.lr_scheduler = lr_scheduler

    def update_average(self) -> None:
        """Count the current weights into the average; call it after each update."""
        if self.ema is not None:
            self.ema.step(self.trainable.values())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights, if there is an average, and is in evaluation mode.

        What is compiled runs eagerly: it would have to be compiled anew for what evaluation gives it.
        """
        training = self.denoiser.training
        parameters = list(self.trainable.values())
        kept = [p.detach().to("cpu", copy=True) for p in parameters] if self.ema is not None else []
        if self.ema is not None:
            self.ema.copy_to(parameters)
        self.denoiser.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for parameter, value in zip(parameters, kept, strict=False):
                parameter.data.copy_(value)
            self.denoiser.train(training)

    def save_for_use(self, folder: str | Path) -> None:
        """Write what a user samples from: the model's folder, or LoRA weights that `load_lora_weights` reads."""
        with self.averaged_weights():
            if self.lora:
                save_adapter(self.denoiser, folder)
            else:
                for name, model in self._saved.items():
                    model.save_pretrained(Path(folder) / name, max_shard_size="1TB")

    def save(self, folder: Path) -> None:
        """Write all that resuming needs into a checkpoint."""
        self.save_for_use(folder)
        raw, average = self._weight_files(folder)
        if not raw.exists():
            save_file({name: p.detach().contiguous() for name, p in self.trainable.items()}, raw)
        if self.ema is not None and not average.exists():
            save_file({name: p.contiguous() for name, p in self._average().items()}, average)
        ema_step = self.ema.optimization_step if self.ema is not None else 0
        save_optimizer(folder, self.optimizer, self.lr_scheduler, ema_step=ema_step)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, or what an older version did."""
        raw, average = self._weight_files(folder)
        _copy_by_name(raw, self.trainable)
        if self.ema is not None:
            _copy_by_name(average, self._average())
        if (folder / OPTIMIZER).is_file():
            state = read_state(folder / OPTIMIZER)
        else:
            state = read_pickle(folder / "custom_checkpoint_0.pkl")
            state["optimizer"] = read_pickle(folder / "optimizer.bin")
        load_optimizer(self.optimizer, self.lr_scheduler, state)
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]

    def _average(self) -> dict[str, Tensor]:
        return dict(zip(self.trainable, self.ema.shadow_params, strict=True))

    def _weight_files(self, folder: str) -> tuple[Path, Path]:
        """Where a checkpoint keeps the trained weights and their average: the model's folder is one if it can be."""
        usable = Path(folder) / self.folder / SAFETENSORS_WEIGHTS_NAME
        raw, average = Path(folder) / "trainable.safetensors", Path(folder) / "average.safetensors"
        if self.lora:
            return raw, average
        return (raw, usable) if self.ema is not None else (usable, average)


class ModelState:
    """A model that is trained whole, its optimizer and schedule, and companions such as a teacher.

    Companions have `state_dict` and `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        companions: tuple[nn.Module, ...] = (),
    ) -> None:
        self.model, self.optimizer, self.lr_scheduler, self.companions = model, optimizer, lr_scheduler, companions

    def save(self, folder: Path) -> None:
        """Write all that resuming needs into a checkpoint."""
        save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))
        companions = [companion.state_dict() for companion in self.companions]
        save_optimizer(folder, self.optimizer, self.lr_scheduler, companions=companions)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, or what an older version did."""
        load_model(self.model, folder / SAFE_WEIGHTS_NAME)
        if (folder / OPTIMIZER).is_file():
            state = read_state(folder / OPTIMIZER)
        else:
            files = [folder / f"custom_checkpoint_{number}.pkl" for number in range(1 + len(self.companions))]
            schedule, *companions = map(read_pickle, files)
            state = {"optimizer": read_pickle(folder / "optimizer.bin"), "lr_scheduler": schedule}
            state["companions"] = companions
        load_optimizer(self.optimizer, self.lr_scheduler, state)
        for companion, values in zip(self.companions, state["companions"], strict=True):
            companion.load_state_dict(values)


def _copy_by_name(file: Path, targets: dict[str, Tensor]) -> None:
    if not file.is_file():
        raise CheckpointError(
            f"The checkpoint lacks {file.name}: its run had another setting of averaged weights, or of a LoRA."
        )
    tensors = load_file(file)
    beside = file.parent.parent / "fusion" / file.name  # of `unet/`, which lacks what is trained with it
    if any(name.startswith(_FUSION) for name in targets.keys() - tensors.keys()) and beside.is_file():
        tensors |= {f"{_FUSION}{name}": tensor for name, tensor in load_file(beside).items()}
    if not targets.keys() <= tensors.keys() or any(tensors[n].shape != t.shape for n, t in targets.items()):
        raise CheckpointError(f"{file} holds the weights of another model: the denoiser or the rank has changed.")
    for name, target in targets.items():
        target.copy_(tensors[name])
