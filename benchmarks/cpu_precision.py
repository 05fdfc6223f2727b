"""What bfloat16 gains in training on a CPU: updates of the showcase's networks in both precisions, in turn.

    OMP_NUM_THREADS=1 python benchmarks/cpu_precision.py

Only processors with bfloat16 units gain (`lscpu` lists `avx512_bf16` or `amx_bf16`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from bundled import DATA
from diffusers_dino.cli.arguments import flag, parse_arguments


@dataclass
class Arguments:
    batch_size: int = flag(16, "Images of an update; the autoencoder's are crops of 64 pixels.")
    repeats: int = flag(6, "Updates of each way.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(DATA / "showcase/unet", torch_dtype=torch.float32).train()
    vae = AutoencoderKL.from_pretrained(DATA / "showcase/vae", torch_dtype=torch.float32).train()
    latents, tokens = torch.randn(args.batch_size, 8, 16, 16), torch.randn(args.batch_size, 5, 128)
    pixels = torch.rand(args.batch_size, 1, 64, 64)
    ways = {
        "UNet": (unet, lambda: unet(latents, torch.arange(args.batch_size), tokens).sample - latents),
        "autoencoder": (vae.to(memory_format=torch.channels_last), lambda: vae(pixels).sample - pixels),
    }
    for name, (model, error) in ways.items():
        seconds = compare(model, error, args.repeats)
        print(f"{name}: {seconds[torch.float32]:.2f} s in float32, {seconds[torch.bfloat16]:.2f} s in bfloat16")


def compare(model: nn.Module, error: Callable[[], Tensor], repeats: int) -> dict[torch.dtype, float]:
    """The median of the seconds of an update in each precision."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for number in range(repeats + 1):
        for dtype, times in seconds.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                difference = error()
            difference.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:  # the first is a warm-up
                times.append(time.perf_counter() - start)
    return {dtype: statistics.median(times) for dtype, times in seconds.items()}


if __name__ == "__main__":
    main()
