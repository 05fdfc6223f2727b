"""A discriminator of patches, which asks an autoencoder for the texture that pixelwise errors average away."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

__all__ = ["Adversary", "PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """Says of each patch of images whether it is real (PatchGAN; Isola et al. 2017, section 3.2.2).

    A patch is 34 pixels wide.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first layer; a multiple of 8.
    """

    def __init__(self, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
                _layer(width, 2 * width, stride=2),
                _layer(2 * width, 4 * width, stride=1),
                nn.Conv2d(4 * width, 1, 4, padding=1),
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(B, C, H, W)` in [-1, 1] -> the output of each layer, of which the last is positive for real."""
        outputs = []
        for layer in self.layers:
            images = layer(images)
            outputs.append(images)
        return outputs


def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1),
        nn.GroupNorm(8, out_channels),
        nn.LeakyReLU(0.2),
    )


class Adversary:
    """A discriminator in training, beside an autoencoder. A companion of a run: it is saved and resumed with it.

    Args:
        accelerator: Of the run.
        discriminator: What learns to tell reconstructions from images.
        lr: Its learning rate, for Adam with betas of 0.5 and 0.9.
    """

    def __init__(self, accelerator: Accelerator, discriminator: nn.Module, lr: float) -> None:
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
        self.discriminator = discriminator
        self._accelerator = accelerator
        self._prepared, self._optimizer = accelerator.prepare(discriminator, optimizer)

    def loss(self, reconstruction: Tensor, pixels: Tensor, error: Tensor, last_layer: nn.Parameter) -> Tensor:
        """How little reconstructions look real, and like their images, a scalar on the scale of their `error`.

        Like their images by the L1 distance of the discriminator's features (Larsen et al. 2016; ten times, as Wang et
        al. 2018, section 3.3). The scale is the ratio of both gradients at the last layer (Esser et al. 2021, equation
        7), at most 10,000. Images and reconstructions are `(B, C, H, W)`.
        """
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        with self._accelerator.autocast():
            *made, opinion = functional_call(self.discriminator, frozen, reconstruction)
            with torch.no_grad():
                *real, _ = self.discriminator(pixels)
        unlike = sum(F.l1_loss(one.float(), other.float()) for one, other in zip(made, real, strict=True))
        loss = 10 * unlike - opinion.float().mean()
        wanted, asked = (torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (error, loss))
        return loss * (wanted / (asked + 1e-4)).clamp(max=1e4).detach()

    def learn(self, pixels: Tensor, reconstruction: Tensor) -> None:
        """One step of the discriminator by the hinge loss on images and their reconstructions, `(B, C, H, W)`."""
        real, made = self._prepared(torch.cat([pixels, reconstruction.detach()]))[-1].float().chunk(2)
        self._accelerator.backward(F.relu(1 - real).mean() + F.relu(1 + made).mean())
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Weights and the state of their optimizer, for a checkpoint."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.discriminator.load_state_dict(state["discriminator"])
        self._optimizer.load_state_dict(state["optimizer"])
