"""What the parts of `gpu.py` share: models, precision, what compiles them, and what a card can do at most."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.pipelines.compilation import compile_models
from gpu_models import Size, make_pipeline
from gpu_timing import SideBySide, free_memory, peak_gb, synchronize

__all__ = ["Bench", "compiled", "count_operations", "measure_peaks", "note_operations"]


@dataclass
class Bench:
    """What the parts share.

    Attributes:
        size: Of the models.
        device: Where to compute.
        dtype: Of autocast, of the frozen models, and of all models in sampling.
        tf32: Whether float32 products may be TF32, outside the check.
        repeats: Of each timing.
        batches: Of training, by the number of the resolution, as far as it is known which fit.
    """

    size: Size
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    repeats: int
    batches: dict[int, int] = field(default_factory=dict)

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

    @cached_property
    def matrix_product(self) -> float:
        """Operations a second of a product of two large matrices: what arithmetic may reach at most."""
        side = 8192 if self.device.type == "cuda" else 256
        one, other = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        timings = SideBySide(self.device, 1)
        timings.run({"product": lambda: one @ other}, 20, warmup=5)
        return 2 * side**3 / statistics.median(timings.seconds["product"])


@contextmanager
def compiled(*models: nn.Module, whole: bool, **options: Any) -> Iterator[None]:
    """Inside, models are compiled, whole or their repeated blocks; RuntimeError if there is no compiler."""
    if not compile_models(*models, whole=whole, **options):
        raise RuntimeError("There is no compiler for this device.")
    try:
        yield
    finally:
        for module in nn.ModuleList(models).modules():
            module._compiled_call_impl = None
        torch.compiler.reset()


def count_operations(way: Callable[[], Any]) -> float:
    """Floating-point operations of one run of a way, forwards and backwards, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        way()
    return float(counter.get_total_flops())


def note_operations(bench: Bench, ways: dict[str, Callable[[], None]], batch: int, result: dict[str, Any]) -> None:
    """Count the operations of each way's update, and measure what a product of matrices reaches."""
    result["operations_per_image"] = {name: count_operations(way) / batch for name, way in ways.items()}
    result["matrix_product"] = bench.matrix_product


def measure_peaks(ways: dict[str, Callable[[], Any]], device: torch.device, peaks: dict[str, float | None]) -> None:
    """Run each way once, and note the memory that it took at most, as it is known."""
    for name, way in ways.items():
        free_memory(device)
        way()
        synchronize(device)
        peaks[name] = peak_gb(device)
