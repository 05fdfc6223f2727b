"""The parts of `gpu.py`: each fills a dictionary as it goes, so that what was measured is kept if it is stopped."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline
from diffusers_dino.pipelines import deep_cache
from diffusers_dino.training.features import FeatureEncoder
from diffusers_dino.training.models import adapt_for_training
from diffusers_dino.training.optim import make_adamw
from gpu_models import PROMPT_TOKENS, Size, make_pipeline, make_text_encoder, random_images
from gpu_timing import SideBySide, free_memory, largest_batch, peak_gb, synchronize

__all__ = ["PARTS", "Bench"]

TRAINING_SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_dino.py"

TOLERANCE = 2e-3  # of float32 on another device, in the mean size of what is compared
SAME_PIXELS = 0.98


@dataclass
class Bench:
    """What the parts share.

    Attributes:
        size: Of the models.
        device: Where to compute.
        dtype: Of autocast, of the frozen models, and of all models in sampling.
        tf32: Whether float32 products may be TF32, outside the check.
        eight_bit_adam: Whether the optimizer keeps its moments in 8 bits.
        repeats: Of each timing.
    """

    size: Size
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    eight_bit_adam: bool
    repeats: int

    @cached_property
    def pipe(self) -> DinoDiffusionPipeline:
        return make_pipeline(self.size)

    def allow_tf32(self, allow: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow

    def for_sampling(self) -> DinoDiffusionPipeline:
        """The pipeline as one samples with it, its gradients gone."""
        self.allow_tf32(self.tf32)
        self.pipe.unet.requires_grad_(False).eval()
        self.pipe.unet.zero_grad(set_to_none=True)
        self.pipe.to(self.device, self.dtype)
        free_memory(self.device)
        return self.pipe


def check(bench: Bench, result: dict[str, Any]) -> None:
    """Tokens, one step of the UNet and DiffSeg's masks on the device against the CPU, in float32 without TF32."""
    bench.allow_tf32(False)
    pipe, side = bench.pipe.to(torch.float32), bench.size.resolutions[1]
    expected = outputs(pipe.to("cpu"), side)
    computed = outputs(pipe.to(bench.device), side)
    for name in ("tokens", "unet", "latents", "attention"):
        result[f"{name}_largest_difference"] = relative(computed[name], expected[name])
    result["masks_same_pixels"] = (computed["masks"] == expected["masks"]).double().mean().item()
    result["tolerance"], result["segments"] = TOLERANCE, len(expected["masks"].unique())
    differences = [value for name, value in result.items() if name.endswith("difference")]
    result["passed"] = max(differences) <= TOLERANCE and result["masks_same_pixels"] >= SAME_PIXELS


@torch.no_grad()
def outputs(pipe: DinoDiffusionPipeline, side: int) -> dict[str, Tensor]:
    """What is compared, brought back to the CPU, for two images that are the same on every device."""
    images, device = random_images(2, side), pipe.device
    tokens = pipe.encode_image(images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, pipe.unet.config["in_channels"], *[side // pipe.vae_scale_factor] * 2, generator=generator)
    step = pipe.unet(noise.to(device), 300, encoder_hidden_states=tokens, return_dict=False)[0]
    diffseg = DiffSegPipeline.from_pipe(pipe)
    maps = diffseg.attention_maps(images, size=side)
    masks = diffseg.segment(maps, 0.35, relative_threshold=True).masks
    latents = diffseg.prepare_latents(list(images), side)
    found = {"tokens": tokens, "unet": step, "latents": latents, "attention": maps, "masks": masks}
    return {name: value.cpu() for name, value in found.items()}


def relative(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the mean size of what is expected; infinity for NaN."""
    difference = ((value - expected).abs().max() / expected.abs().mean()).item()
    return difference if difference == difference else float("inf")


def training_large(bench: Bench, result: dict[str, Any]) -> None:
    """Training at the larger resolution."""
    training(bench, result, 0)


def training_small(bench: Bench, result: dict[str, Any]) -> None:
    """Training at the smaller resolution."""
    training(bench, result, 1)


def training(bench: Bench, result: dict[str, Any], which: int) -> None:
    """One update with VAE and encoder in the step, one from cached features, and one of diffusers' text-to-image."""
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

        batch = largest_batch(candidates, attempt, bench.device)
        ways = trainer.ways(batch, resolution)
        result |= {"resolution": resolution, "batch_size": batch, "peak_gb": {}}
        measure_peaks(ways, bench.device, result["peak_gb"])
        result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
        timings.run(ways, bench.repeats)
    finally:
        trainer.forget()


def measure_peaks(ways: dict[str, Callable[[], Any]], device: torch.device, peaks: dict[str, float | None]) -> None:
    """Run each way once, and note the memory that it took at most, as it is known."""
    for name, way in ways.items():
        free_memory(device)
        way()
        synchronize(device)
        peaks[name] = peak_gb(device)


def load_training_script() -> ModuleType:
    """The script whose loss is measured; it is in no package."""
    spec = importlib.util.spec_from_file_location("train_dino", TRAINING_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


@dataclass
class Trainer:
    """Updates of one UNet by one optimizer, from different losses."""

    bench: Bench
    trainable: list[nn.Parameter]
    updates: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.optimizer = make_adamw(self.trainable, lr=1e-5, eight_bit=self.bench.eight_bit_adam)
        self.text_encoder = make_text_encoder(self.bench.size).to(self.bench.device, self.bench.dtype)
        self.encode = FeatureEncoder(self.bench.pipe.vae, self.bench.pipe.conditioner, self.bench.device)
        self.schedule = DDPMScheduler.from_config(self.bench.pipe.scheduler.config)
        self.script = load_training_script()
        self.arguments = self.script.Arguments()

    def forget(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def ways(self, batch_size: int, resolution: int) -> dict[str, Callable[[], None]]:
        """The three updates, each of a batch that waits in the host's memory."""
        bench, pipe = self.bench, self.bench.pipe
        images = pinned(random_images(batch_size, resolution), bench.device)
        positions = list(range(batch_size))
        features = self.encode({"image": images})
        cached = tuple(pinned(part.to("cpu", torch.float16), bench.device) for part in features)
        prompts = torch.randint(0, 1000, (batch_size, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
        prompts = pinned(prompts, bench.device)

        def ours(batch: dict[str, Any]) -> Tensor:
            return self.script.compute_loss(self.arguments, pipe, self.denoise, self.encode, batch)

        return {
            "online": lambda: self.update(lambda: ours({"image": images, "position": positions})),
            "cached": lambda: self.update(lambda: ours({"features": cached, "position": positions})),
            "diffusers": lambda: self.update(lambda: self.text_to_image_loss(images, prompts)),
        }

    def denoise(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet as accelerate prepares it: in mixed precision, and only it."""
        with torch.autocast(self.bench.device.type, self.bench.dtype, enabled=self.bench.dtype != torch.float32):
            return self.bench.pipe.unet(*args, **kwargs)

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
        if not loss.isfinite():  # also waits for the device, as both scripts do when they log the loss
            raise FloatingPointError(f"Update {self.updates}: the loss is {loss.item()}.")
        self.updates += 1


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """As a loader hands it over: in memory that the GPU can read by itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sampling(bench: Bench, result: dict[str, Any]) -> None:
    """Variations with guidance against diffusers' pipeline on the same UNet and VAE; then fewer steps, less work."""
    pipe = bench.for_sampling()
    batch, (full, few, _) = bench.size.sampling_batch, bench.size.steps
    embeds = pipe.encode_image(random_images(batch, bench.size.resolutions[0]))
    result |= {"batch_size": batch, "steps": full, "few_steps": few, "guidance_scale": 2.0, "peak_gb": {}}
    ddim, fast = pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    def ours(steps: int = full, guidance_scale: float = 2.0) -> Callable[[], Any]:
        return lambda: sample(pipe, embeds, steps, guidance_scale)

    def with_scheduler() -> None:
        pipe.scheduler = fast
        try:
            sample(pipe, embeds, few)
        finally:
            pipe.scheduler = ddim

    def with_cache() -> None:
        pipe.enable_cache(deep_cache(pipe.unet))
        try:
            sample(pipe, embeds, full)
        finally:
            pipe.disable_cache()

    ways = {"pipeline": ours(), "diffusers": text_to_image(pipe, embeds, full)}
    ways |= {"few_steps": with_scheduler, "deep_cache": with_cache, "no_guidance": ours(guidance_scale=1.0)}
    measure_peaks(ways, bench.device, result["peak_gb"])
    result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
    timings.run(ways, bench.repeats, warmup=0)  # the peaks above were of warm-ups


def sample(pipe: DinoDiffusionPipeline, embeds: Tensor, steps: int, guidance_scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    return pipe(image_embeds=embeds, generator=generator, **options).images


def text_to_image(pipe: DinoDiffusionPipeline, embeds: Tensor, steps: int) -> Callable[[], Any]:
    """diffusers' Stable Diffusion pipeline on the same models, given as many tokens of 'text' as there are of images.

    The texts' encoder is left out on both sides, and so is the safety checker.
    """
    theirs = StableDiffusionPipeline(
        pipe.vae, None, None, pipe.unet, pipe.scheduler, None, None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    texts = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
    return lambda: theirs(**texts, generator=torch.Generator().manual_seed(0), **options)


def diffseg(bench: Bench, result: dict[str, Any]) -> None:
    """Segments of one image at the larger resolution: the whole call, and its two halves."""
    pipe = DiffSegPipeline.from_pipe(bench.for_sampling())
    side = bench.size.resolutions[0]
    image, options = random_images(1, side), {"relative_threshold": True}
    maps = pipe.attention_maps(image, size=side)
    ways = {
        "whole": lambda: pipe(image, size=side, merge_threshold=0.35, **options),
        "attention": lambda: pipe.attention_maps(image, size=side),
        "merging": lambda: pipe.segment(maps, 0.35, output_size=side, **options),
    }
    result |= {"side": side, "maps": list(maps.shape[1:])}
    result["speed"] = timings = SideBySide(bench.device, 1)
    timings.run(ways, 3 * bench.repeats)
    free_memory(bench.device)
    ways["whole"]()
    result["peak_gb"] = peak_gb(bench.device)


def compiled(bench: Bench, result: dict[str, Any]) -> None:
    """Sampling with the UNet's repeated blocks compiled against the same pipeline as it is."""
    pipe = bench.for_sampling()
    batch, steps = bench.size.sampling_batch, bench.size.steps[0]
    embeds = pipe.encode_image(random_images(batch, bench.size.resolutions[0]))

    def eager() -> None:
        with torch.compiler.set_stance("force_eager"):
            sample(pipe, embeds, steps)

    pipe.unet.compile_repeated_blocks(fullgraph=True)
    try:
        timings = result["compilation"] = SideBySide(bench.device, batch)
        timings.run({"first_call": lambda: sample(pipe, embeds, steps)}, 1, warmup=0)
        result["speed"] = timings = SideBySide(bench.device, batch, reference="eager")
        timings.run({"eager": eager, "compiled": lambda: sample(pipe, embeds, steps)}, bench.repeats)
    finally:
        for module in pipe.unet.modules():
            module._compiled_call_impl = None
        torch.compiler.reset()


def offloading(bench: Bench, result: dict[str, Any]) -> None:
    """One image with the models on the device, and with those that wait on the CPU and come when they are needed."""
    parts, steps = bench.for_sampling().to("cpu").components, bench.size.steps[2]
    image, device = random_images(1, bench.size.resolutions[0]), bench.device
    on_gpu = device.type == "cuda"
    ways: dict[str, Callable[[DinoDiffusionPipeline], Any]] = {
        "on_device": lambda pipe: pipe.to(device),
        "model_offload": lambda pipe: pipe.enable_model_cpu_offload(device=device),
        "group_offload": lambda pipe: pipe.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=on_gpu
        ),
    }
    if on_gpu:  # which diffusers insists on
        ways["sequential_offload"] = lambda pipe: pipe.enable_sequential_cpu_offload(device=device)
    result |= {"steps": steps, "peak_gb": {}, "speed": (timings := SideBySide(device, 1))}
    for name, enable in ways.items():
        pipe = DinoDiffusionPipeline(**{key: deepcopy(part) for key, part in parts.items()})  # hooks would stay
        pipe.set_progress_bar_config(disable=True)
        enable(pipe)
        free_memory(device)
        timings.run({name: partial(pipe, image, num_inference_steps=steps, output_type="pt")}, bench.repeats)
        result["peak_gb"][name] = peak_gb(device)


PARTS: dict[str, tuple[Callable[[Bench, dict[str, Any]], None], float]] = {  # with its share of the time
    "check": (check, 1.0),
    "training_large": (training_large, 3.0),
    "training_small": (training_small, 2.5),
    "sampling": (sampling, 2.5),
    "diffseg": (diffseg, 1.0),
    "compiled": (compiled, 2.0),
    "offloading": (offloading, 1.0),
}
