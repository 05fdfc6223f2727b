"""The parts of `gpu.py` that train: beside diffusers' step, in every form, and a model that launches limit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import is_bitsandbytes_available
from torch import Tensor, nn

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.training.features import FeatureEncoder, encode_ahead
from diffusers_dino.training.models import adapt_for_training
from diffusers_dino.training.optim import make_adamw
from gpu_bench import Bench, compiled, count_operations, measure_peaks, note_operations
from gpu_models import PROMPT_TOKENS, SMALL, make_text_encoder, random_images
from gpu_timing import SideBySide, free_memory, largest_batch

__all__ = ["small_model", "training_large", "training_small", "training_ways"]

TRAINING_SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_dino.py"

ADAMS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused": lambda parameters: make_adamw(parameters, lr=1e-5),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, foreach=True),
    "8bit": lambda parameters: make_adamw(parameters, lr=1e-5, eight_bit=True),
}


def training_large(bench: Bench, result: dict[str, Any]) -> None:
    """Training at the larger resolution."""
    training(bench, result, 0)


def training_small(bench: Bench, result: dict[str, Any]) -> None:
    """Training at the smaller resolution."""
    training(bench, result, 1)


def training(bench: Bench, result: dict[str, Any], which: int) -> None:
    """Updates with VAE and encoder in the step or ahead of it, from cached features, and diffusers' text-to-image."""
    bench.allow_tf32(bench.tf32)
    resolution, candidates = bench.size.resolutions[which], bench.size.batches[which]
    bench.pipe.unet.requires_grad_(True)
    trainable = adapt_for_training(bench.pipe, bench.device, bench.dtype)
    trainer = Trainer(bench, trainable)
    free_memory(bench.device)
    try:

        def attempt(size: int) -> None:
            trainer.forget()  # of an attempt that broke off
            for way in trainer.ways(size, resolution).values():
                way()

        batch = bench.batches[which] = largest_batch(candidates, attempt, bench.device)
        ways = trainer.ways(batch, resolution)
        result |= {"resolution": resolution, "batch_size": batch, "peak_gb": {}}
        measure_peaks(ways, bench.device, result["peak_gb"])
        result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
        timings.run(ways, bench.repeats)
        note_operations(bench, ways, batch, result)
    finally:
        trainer.forget()


def training_ways(bench: Bench, result: dict[str, Any]) -> None:
    """Our updates, and diffusers', in each form; one after the other, as each has its own moments.

    The last compile the whole models, which takes longest.
    """
    bench.allow_tf32(bench.tf32)
    bench.pipe.unet.requires_grad_(True)
    trainable = adapt_for_training(bench.pipe, bench.device, bench.dtype)
    batch = bench.batches.get(0, bench.size.sampling_batch)  # without `training_large`, one that fits
    result |= {"resolution": bench.size.resolutions[0], "batch_size": batch}
    result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
    forms = [("diffusers", "diffusers", False, None, "fused"), ("cached", "cached", False, None, "fused")]
    forms += [("cached, foreach Adam", "cached", False, None, "foreach")]
    if is_bitsandbytes_available() and bench.device.type == "cuda":
        forms += [("cached, 8-bit Adam", "cached", False, None, "8bit")]
    forms += [("cached, channels-last", "cached", True, None, "fused")]
    forms += [("online, ahead", "online, ahead", False, None, "fused")]
    for extent, whole in (("blocks", False), ("whole", True)):
        forms += [
            (f"diffusers, compiled {extent}", "diffusers", False, whole, "fused"),
            (f"cached, compiled {extent}", "cached", False, whole, "fused"),
            (f"cached, channels-last, compiled {extent}", "cached", True, whole, "fused"),
            (f"online, ahead, channels-last, compiled {extent}", "online, ahead", True, whole, "fused"),
        ]
    operations = {}
    for name, kind, channels_last, whole, adam in forms:
        with in_form(bench.pipe, kind, channels_last, whole):
            trainer = Trainer(bench, trainable, adam)
            way = trainer.ways(batch, bench.size.resolutions[0])[kind]
            timings.run({name: way}, bench.repeats, warmup=2)
            if kind not in operations:
                operations[kind] = count_operations(way) / batch
            trainer.forget()
        del trainer, way
        free_memory(bench.device)
        result["operations_per_image"] = {form: operations[of] for form, of, *_ in forms if of in operations}
        result["matrix_product"] = bench.matrix_product


@contextmanager
def in_form(pipe: DinoDiffusionPipeline, kind: str, channels_last: bool, whole: bool | None) -> Iterator[None]:
    """Inside, UNet and VAE have a memory format; models are compiled by blocks or whole, or not (None).

    They are those that `train_dino.py --torch_compile` compiles: the frozen ones only where they are in the update.
    """
    with ExitStack() as stack:
        if channels_last:
            for model in (pipe.unet, pipe.vae):
                model.to(memory_format=torch.channels_last)
                stack.callback(model.to, memory_format=torch.contiguous_format)
        if whole is not None:
            stack.enter_context(compiled(pipe.unet, whole=whole))
            if kind.startswith("online"):
                stack.enter_context(compiled(pipe.vae.encoder, pipe.conditioner, whole=whole, dynamic=False))
        yield


def small_model(bench: Bench, result: dict[str, Any]) -> None:
    """Updates of a UNet of 1.1 M weights on cached latents of 64 px, with an average: launches are the limit."""
    small = Bench(SMALL, bench.device, bench.dtype, bench.tf32, bench.repeats)
    batch = SMALL.sampling_batch
    trainable = adapt_for_training(small.pipe, bench.device, bench.dtype)
    forms: dict[str, tuple[int, dict[str, Any] | None]] = {
        "each loss read": (1, None),
        "read every 10": (10, None),
        "read every 10, compiled": (10, {}),
    }
    if bench.device.type == "cuda":
        forms["read every 10, CUDA graphs"] = (10, {"mode": "reduce-overhead"})
    result |= {"weights": sum(parameter.numel() for parameter in trainable), "batch_size": batch}
    result["updates"] = timings = SideBySide(bench.device, 10, reference="each loss read")
    for name, (exchange, options) in forms.items():
        average = EMAModel(trainable, decay=0.995, foreach=True)
        trainer = Trainer(small, trainable, exchange=exchange, average=average)
        update = trainer.ways(batch, SMALL.resolutions[0])["cached"]

        def ten(update: Callable[[], None] = update) -> None:
            for _ in range(10):
                update()

        with nullcontext() if options is None else compiled(small.pipe.unet, whole=True, **options):
            timings.run({name: ten}, 3 * bench.repeats, warmup=2)


def load_training_script() -> ModuleType:
    """The script whose loss is measured; it is in no package."""
    spec = importlib.util.spec_from_file_location("train_dino", TRAINING_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


class MixedPrecision(nn.Module):
    """The UNet as accelerate prepares it: in mixed precision, and only it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(sample.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(sample, *args, **kwargs)


@dataclass
class Trainer:
    """Updates of one UNet by one optimizer, from different losses.

    `adam` is one of `ADAMS`; an update reads its loss off the device once in `exchange` of them. There may be an
    average of the weights.
    """

    bench: Bench
    trainable: list[nn.Parameter]
    adam: str = "fused"
    exchange: int = 1
    average: EMAModel | None = None
    updates: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.optimizer = ADAMS[self.adam](self.trainable)
        self.text_encoder = make_text_encoder(self.bench.size).to(self.bench.device, self.bench.dtype)
        self.encode = FeatureEncoder(self.bench.pipe.vae, self.bench.pipe.conditioner, self.bench.device)
        self.schedule = DDPMScheduler.from_config(self.bench.pipe.scheduler.config)
        self.script = load_training_script()
        self.arguments = self.script.Arguments()
        self.denoise = MixedPrecision(self.bench.pipe.unet, self.bench.dtype)

    def forget(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def ways(self, batch_size: int, resolution: int) -> dict[str, Callable[[], None]]:
        """The updates, each of a batch that waits in the host's memory; one encodes the next batch ahead."""
        bench, pipe = self.bench, self.bench.pipe
        images = pinned(random_images(batch_size, resolution), bench.device)
        positions = list(range(batch_size))
        features = self.encode({"image": images})
        cached = tuple(pinned(part.to("cpu", torch.float16), bench.device) for part in features)
        prompts = torch.randint(0, 1000, (batch_size, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
        prompts = pinned(prompts, bench.device)

        def ours(batch: dict[str, Any]) -> Tensor:
            return self.script.compute_loss(self.arguments, pipe, self.denoise, self.encode, batch)

        batch = {"image": images, "position": positions, "key": []}
        ahead = encode_ahead(repeat(batch), self.encode)
        return {
            "online": lambda: self.update(lambda: ours(batch)),
            "online, ahead": lambda: self.update(lambda: ours(next(ahead))),
            "cached": lambda: self.update(lambda: ours({"features": cached, "position": positions})),
            "diffusers": lambda: self.update(lambda: self.text_to_image_loss(images, prompts)),
        }

    def text_to_image_loss(self, images: Tensor, prompts: Tensor) -> Tensor:
        """The loss of diffusers' `train_text_to_image.py`, whose frozen models are in lower precision, too."""
        pipe, device, dtype = self.bench.pipe, self.bench.device, self.bench.dtype
        pixels = (2 * images - 1).to(device, dtype, non_blocking=True)
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config["scaling_factor"]
            tokens = self.text_encoder(prompts.to(device, non_blocking=True), return_dict=False)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.schedule.config["num_train_timesteps"], (len(latents),), device=device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.denoise(noisy, timesteps, tokens, return_dict=False)[0]
        return nn.functional.mse_loss(prediction.float(), noise.float())

    def update(self, loss_of_batch: Callable[[], Tensor]) -> None:
        """What both scripts do with a loss."""
        loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.trainable)
        self.updates += 1
        if self.updates % self.exchange == 0 and not loss.isfinite():  # waits for the device, as who logs a loss does
            raise FloatingPointError(f"Update {self.updates}: the loss is {loss.item()}.")


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """As a loader hands it over: in memory that the GPU can read by itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
