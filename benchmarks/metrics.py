r"""Memory of streamed statistics, and the agreement of distances with independent implementations.

    python benchmarks/metrics.py --output_dir outputs/metrics-benchmark

1. Statistics of `--num_images` features pass through a process of their own, a batch at a time. Reported: growth of
   its resident memory, at most, over what it had before, for a tenth of the features and for all of them, which must
   not differ. Linux only.
2. Fréchet and kernel distance, precision, recall, density and coverage of random features, beside torch-fidelity,
   torchmetrics and prdc; and the Fréchet distance of shifted Gaussians beside its closed form.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser

from resident import peak, start_peak


@dataclass
class Arguments:
    num_images: int = 100_000
    dim: int = 1024
    batch_size: int = 64
    stream: int = 0  # set by the benchmark itself: be the process that is measured, with so many features
    output_dir: str = "outputs/metrics-benchmark"


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if args.stream:
        print(json.dumps(stream(args.stream, args.dim, args.batch_size)))
        return
    report = {"arguments": vars(args), "torch": torch.__version__, "threads": torch.get_num_threads()}
    report["statistics"] = [measure_stream(args, count) for count in (args.num_images // 10, args.num_images)]
    report["relative_differences"] = compare()
    report["shifted_gaussians"] = shifted_gaussians()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def measure_stream(args: Arguments, count: int) -> dict[str, float]:
    options = [f"--stream={count}", f"--dim={args.dim}", f"--batch_size={args.batch_size}"]
    done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def stream(count: int, dim: int, batch_size: int) -> dict[str, float]:
    """Feed features to statistics, and report what memory that took beyond what the process had."""
    from diffusers_dino.metrics import GaussianStatistics

    generator = torch.Generator().manual_seed(0)
    warm = torch.randn(batch_size, dim).double()
    warm = (warm.T @ warm).sum()  # what the first matrix product takes for good
    before, start = start_peak(), time.perf_counter()
    statistics = GaussianStatistics(dim)
    for first in range(0, count, batch_size):
        statistics.update(torch.randn(min(batch_size, count - first), dim, generator=generator))
    seconds = time.perf_counter() - start
    return {
        "features": statistics.count,
        "seconds": seconds,
        "mb_before": before,
        "mb_grown": peak() - before,
    }


def compare(n: int = 1500, m: int = 1200, dim: int = 64) -> dict[str, float]:
    """Relative difference of each figure from an independent implementation."""
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    from diffusers_dino.metrics import frechet_distance, kernel_distance, manifold_figures

    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) / dim**0.5
    real = torch.randn(m, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) / dim**0.5 + 0.1
    ours, real = ours.double(), real.double()
    statistics = [fid_features_to_statistics(x) for x in (ours, real)]
    moments = [value for x in (ours, real) for value in (x.mean(0), torch.cov(x.T))]
    kid = kid_features_to_metric(ours[:m], real, kid_subsets=1, kid_subset_size=m, verbose=False)
    figures = manifold_figures(ours, real, 5)
    theirs = compute_prdc(real.numpy(), ours.numpy(), nearest_k=5)
    frechet, kernel = frechet_distance(ours, real), kernel_distance(ours[:m], real)
    pairs = {
        "frechet, torch-fidelity": (
            frechet,
            fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        ),
        "frechet, torchmetrics": (frechet, _compute_fid(*moments).item()),
        "kernel, torch-fidelity": (kernel, kid["kernel_inception_distance_mean"]),
        "kernel, torchmetrics": (kernel, poly_mmd(ours[:m], real).item()),
        **{f"{name}, prdc": (getattr(figures, name), float(value)) for name, value in theirs.items()},
    }
    return {name: abs(a - b) / max(abs(b), 1e-12) for name, (a, b) in pairs.items()}


def shifted_gaussians(n: int = 500_000, dim: int = 4) -> dict[str, float]:
    """Samples are centred first: of their sampling error that of the covariance is left."""
    from diffusers_dino.metrics import frechet_distance

    generator = torch.Generator().manual_seed(0)
    shift = torch.linspace(-0.5, 1, dim)
    first, second = (torch.randn(n, dim, generator=generator) for _ in range(2))
    distance = frechet_distance(first - first.mean(0), second - second.mean(0) + shift)
    return {"n": n, "measured": distance, "closed_form": shift.square().sum().item()}


if __name__ == "__main__":
    main()
