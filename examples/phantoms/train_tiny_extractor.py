r"""Train the small encoder that measures where no published weights are at hand.

    python examples/phantoms/train_tiny_extractor.py --output_dir src/diffusers_dino/metrics/extractors/weights

Without labels, without gradients, and without a weight of a conditioner. The convolutions are the principal components
of image patches, each with both signs (as PCANet, arXiv 1404.3606). The linear layer is Fisher's discriminant between
instances: copies of one image (moved a little, in another exposure, slightly blurred or noisy) are one class, and the
same image badly blurred, noisy, mixed or shuffled, as generators get it wrong, is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.console import run
from diffusers_dino.data import Augmentation, Preprocessing, open_images
from diffusers_dino.files import atomic_write
from diffusers_dino.metrics.extractors.files import write_sha256
from diffusers_dino.metrics.extractors.tiny import TinyNetwork
from diffusers_dino.pixels import resize_unit
from diffusers_dino.seeds import generator_for

EXAMPLES = Path(__file__).resolve().parents[1]
SIZE = 64
MOVE = Augmentation(sharpness=0.5, shear=0.02, translation=0.03, scale=(0.97, 1.08))


@dataclass
class Arguments:
    train_data_dir: str = flag(
        str(EXAMPLES / "data/phantom-cxr/phantom-cxr-train-*.tar"), "Images, as everywhere: folder or tars."
    )
    output_dir: str = flag("outputs/tiny-extractor", "Where tiny.safetensors and its .sha256 go.")
    copies: int = flag(6, "Copies of each image and of each damaged image.")
    damages: int = flag(4, "Damaged forms of each image.")
    shrinkage: float = flag(0.01, "Added to the variance of copies, as a fraction of its mean.")
    seed: int = flag(0, "Of copies and damages.")


@torch.no_grad()
def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    images = load_thumbnails(args.train_data_dir)  # (N, 1, 64, 64)
    generator = generator_for(args.seed, "tiny extractor")
    network = TinyNetwork()
    seen = (near_copy(images, generator) - 0.5) / 0.25
    fit_filters(network.first, seen)
    fit_filters(network.second, F.relu(network.first(seen)))
    instances = [images, *(damaged(images, generator) for _ in range(args.damages))]
    features = [  # the copies of each instance: (copies, N, 768) double
        torch.stack([network.pooled(near_copy(x, generator)).double() for _ in range(args.copies)]) for x in instances
    ]
    fit_discriminant(network.linear, torch.cat(features, dim=1), args.shrinkage)
    output = Path(args.output_dir) / "tiny.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(save({name: value.half().contiguous() for name, value in network.state_dict().items()}))
    print(f"{output}: {output.stat().st_size} bytes, SHA-256 {write_sha256(output)}")


def load_thumbnails(source: str) -> Tensor:
    """All images as `(N, 1, 64, 64)` in [0, 1]."""
    images = open_images(source, Preprocessing(128))
    stacked = torch.stack([images[i]["image"].mean(dim=0, keepdim=True) for i in range(len(images))])
    return resize_unit(stacked, SIZE, "bilinear")


def fit_filters(convolution: nn.Conv2d, inputs: Tensor) -> None:
    """Half of the filters are principal components of patches, in units of their deviation; half their negatives."""
    options = {"kernel_size": convolution.kernel_size, "stride": 4}
    patches = F.unfold(inputs, **options).movedim(1, -1).flatten(0, 1).double()  # (N P, C k k)
    mean = patches.mean(dim=0)
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    half = convolution.out_channels // 2
    components = eigenvectors[:, -half:] / eigenvalues[-half:].clamp(min=1e-6).sqrt()  # (C k k, half)
    components = components * components.sum(dim=0).sign()  # free of LAPACK's choice of signs
    weight = torch.cat([components, -components], dim=1).T
    convolution.weight.copy_(weight.view_as(convolution.weight))
    convolution.bias.copy_(-weight @ mean)


def fit_discriminant(linear: nn.Linear, features: Tensor, shrinkage: float) -> None:
    """Directions that tell instances `(copies, instances, D)` apart, in units of the deviation between copies."""
    means = features.mean(dim=0)  # (instances, D)
    within = torch.cov((features - means).flatten(0, 1).T)
    within += shrinkage * within.diagonal().mean() * torch.eye(len(within))
    root = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(root, torch.cov(means.T), upper=False)
    between = torch.linalg.solve_triangular(root, whitened.T, upper=False)  # in units of `within`
    eigenvalues, eigenvectors = torch.linalg.eigh(between)
    print("variance between instances over that of copies:", eigenvalues.flip(0)[::8][:9].tolist())
    directions = torch.linalg.solve_triangular(root.T, eigenvectors[:, -linear.out_features :], upper=True)
    directions = (directions * directions.sum(dim=0).sign()).T  # (64, D)
    linear.weight.copy_(directions)
    linear.bias.copy_(-directions @ means.mean(dim=0))


def near_copy(images: Tensor, generator: torch.Generator) -> Tensor:
    """What is still the same picture: moved a little, in another exposure, slightly blurred or noisy."""
    x = MOVE.apply(images, torch.rand(len(images), 7, generator=generator))
    gain, offset, gamma, sigma, noise = torch.rand(5, len(images), 1, 1, 1, generator=generator)
    x = (0.85 + 0.3 * gain) * (x.clamp(min=1e-4) ** (2 ** (0.6 * (gamma - 0.5))) - 0.5) + 0.5 + 0.15 * (offset - 0.5)
    x = x + (gaussian_blur(x, 5, 0.6) - x) * (2 * sigma - 1).clamp(min=0)  # every other one is sharp
    return (x + 0.02 * noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def damaged(images: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter each blurred, noisy, mixed with another image, and with half of its patches in wrong places."""
    x = images[torch.randperm(len(images), generator=generator)]
    blurred, noisy, mixed, shuffled = x.chunk(4)
    sigma = 1.0 + 2.0 * torch.rand((), generator=generator).item()
    noise, weight = torch.rand(2, max(len(noisy), len(mixed)), 1, 1, 1, generator=generator)
    noise, weight = 0.04 + 0.2 * noise[: len(noisy)], 0.3 + 0.4 * weight[: len(mixed)]
    parts = [
        gaussian_blur(blurred, 13, sigma),
        noisy + noise * torch.randn(noisy.shape, generator=generator),
        weight * mixed + (1 - weight) * mixed.roll(1, dims=0),
        shuffle_patches(shuffled, generator),
    ]
    return torch.cat(parts).clamp(0, 1)


def shuffle_patches(images: Tensor, generator: torch.Generator, side: int = 16) -> Tensor:
    """Half of the patches of `(N, 1, H, H)` change places among themselves."""
    patches = F.unfold(images, side, stride=side)  # (N, side^2, P)
    chosen = torch.randperm(patches.shape[-1], generator=generator)[: patches.shape[-1] // 2]
    patches[..., chosen] = patches[..., chosen.roll(1)]
    return F.fold(patches, images.shape[-2:], side, stride=side)


if __name__ == "__main__":
    run(main)
