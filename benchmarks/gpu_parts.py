"""The parts of `gpu.py`: each fills a dictionary as it goes, so that what was measured is kept if it is stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, StableDiffusionPipeline, TCDScheduler
from diffusers.utils import numpy_to_pil
from torch import Tensor

from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.pipelines import deep_cache
from diffusers_dino.synthesis import SynthesisSettings, plan_reconstruction, synthesise
from gpu_bench import Bench, compiled, measure_peaks, note_operations
from gpu_models import random_images
from gpu_timing import SideBySide, free_memory, peak_gb
from gpu_training import small_model, training_large, training_small, training_ways

__all__ = ["PARTS"]

TOLERANCE = 2e-3  # of float32 on another device, in the mean size of what is compared
SAME_PIXELS = 0.98


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


def sampling(bench: Bench, result: dict[str, Any]) -> None:
    """Variations with guidance against diffusers' pipeline on the same UNet and VAE; then fewer steps, less work."""
    pipe = bench.for_sampling()
    batch, (full, few, _) = bench.size.sampling_batch, bench.size.steps
    embeds = pipe.encode_image(random_images(batch, bench.size.resolutions[0]))
    result |= {"batch_size": batch, "steps": full, "few_steps": few, "guidance_scale": 2.0, "peak_gb": {}}
    fast, consistent = (
        kind.from_config(pipe.scheduler.config) for kind in (DPMSolverMultistepScheduler, TCDScheduler)
    )

    def with_cache() -> None:
        pipe.enable_cache(deep_cache(pipe.unet))
        try:
            sample(pipe, embeds, full)
        finally:
            pipe.disable_cache()

    def with_fused_projections() -> None:
        pipe.fuse_qkv_projections(vae=False)
        try:
            sample(pipe, embeds, full)
        finally:
            pipe.unfuse_qkv_projections(vae=False)

    ways = {"pipeline": partial(sample, pipe, embeds, full), "diffusers": text_to_image(pipe, embeds, full)}
    ways |= {
        "few_steps": partial(sample_with, fast, pipe, embeds, few),
        "distilled_4_steps": partial(sample_with, consistent, pipe, embeds, 4, 1.0),  # the guidance is its input
        "deep_cache": with_cache,
        "fused_qkv": with_fused_projections,
        "no_guidance": partial(sample, pipe, embeds, full, 1.0),
    }
    measure_peaks(ways, bench.device, result["peak_gb"])
    result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
    timings.run(ways, bench.repeats, warmup=0)  # the peaks above were of warm-ups
    note_operations(bench, {name: ways[name] for name in ("pipeline", "diffusers")}, batch, result)


def larger_batch(bench: Bench, result: dict[str, Any]) -> None:
    """The same of more images at once."""
    pipe, batch, steps = bench.for_sampling(), bench.size.larger_batch, bench.size.steps[0]
    embeds = pipe.encode_image(random_images(batch, bench.size.resolutions[0]))
    result["batch_size"] = batch
    result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
    ways = {"pipeline": partial(sample, pipe, embeds, steps), "diffusers": text_to_image(pipe, embeds, steps)}
    timings.run(ways, max(1, bench.repeats // 2))


def sample_with(scheduler: SchedulerMixin, pipe: DinoDiffusionPipeline, *settings: Any) -> None:
    """`sample` with another scheduler for the moment."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        sample(pipe, *settings)
    finally:
        pipe.scheduler = before


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


def compiled_sampling(bench: Bench, result: dict[str, Any]) -> None:
    """Ours and diffusers' pipeline as they are and compiled, by blocks and then whole, with the VAE's decoder.

    Both call the same UNet and VAE, so both are compiled in the same way.
    """
    pipe = bench.for_sampling()
    batch, steps = bench.size.sampling_batch, bench.size.steps[0]
    embeds = pipe.encode_image(random_images(batch, bench.size.resolutions[0]))
    ways = {"pipeline": partial(sample, pipe, embeds, steps), "diffusers": text_to_image(pipe, embeds, steps)}
    result["batch_size"] = batch
    result["first_calls"] = first = SideBySide(bench.device, batch)
    result["speed"] = timings = SideBySide(bench.device, batch, reference="diffusers")
    timings.run(ways, bench.repeats)
    for extent, whole in (("blocks", False), ("whole", True)):
        with compiled(pipe.unet, pipe.vae.decoder, whole=whole, dynamic=False):
            named = {f"{name}, compiled {extent}": way for name, way in ways.items()}
            first.run({f"compiling {extent}": next(iter(named.values()))}, 1, warmup=0)
            timings.run(named, bench.repeats)


def engine(bench: Bench, result: dict[str, Any]) -> None:
    """The synthesis engine, which writes shards, beside a bare loop of the pipeline for as many images."""
    pipe, batch, steps = bench.for_sampling(), bench.size.sampling_batch, bench.size.steps[1]
    count, side = 3 * batch, bench.size.resolutions[0]
    pictures = random_images(count, side)
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(numpy_to_pil(pictures.movedim(1, -1).numpy())):
            picture.save(Path(folder, f"{number:03d}.png"))
        images = open_images(folder, Preprocessing(side, remove_borders=False))
        settings = SynthesisSettings(num_inference_steps=steps, batch_size=batch, shard_size=count)
        plan = plan_reconstruction(images.keys, num_images=count, settings=settings)

        def by_engine() -> None:
            with tempfile.TemporaryDirectory() as made:
                synthesise(plan, pipe, images, Path(made, "set"), progress=False)

        def by_loop() -> None:
            for start in range(0, count, batch):
                sample(pipe, pipe.encode_image(pictures[start : start + batch]), steps).cpu()

        result |= {"images": count, "batch_size": batch, "steps": steps}
        result["speed"] = timings = SideBySide(bench.device, count, reference="loop")
        timings.run({"loop": by_loop, "engine": by_engine}, max(1, bench.repeats // 2))


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
    "training_large": (training_large, 2.5),
    "training_small": (training_small, 1.5),
    "small_model": (small_model, 1.0),
    "sampling": (sampling, 2.0),
    "larger_batch": (larger_batch, 1.0),
    "diffseg": (diffseg, 0.5),
    "engine": (engine, 1.0),
    "offloading": (offloading, 1.0),
    "training_ways": (training_ways, 5.0),
    "compiled": (compiled_sampling, 3.0),
}
