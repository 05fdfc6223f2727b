"""A discriminator beside an autoencoder."""

import pytest
import torch
from accelerate import Accelerator

import tiny
from diffusers_dino.training.adversarial import Adversary, PatchDiscriminator


@pytest.fixture
def adversary() -> Adversary:
    torch.manual_seed(0)
    return Adversary(Accelerator(cpu=True), PatchDiscriminator(width=8), lr=2e-3)


def test_it_learns_to_tell_blurred_images_from_sharp_ones(adversary):
    sharp = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2)
    for _ in range(40):
        adversary.learn(sharp, blurred)
    with torch.no_grad():
        real, made = (adversary.discriminator(images)[-1] for images in (sharp, blurred))
    assert real.mean() > made.mean() + 1


def test_its_gradient_is_as_large_as_that_of_the_error_and_trains_no_discriminator(adversary):
    vae = tiny.tiny_vae(channels=1)
    pixels = tiny.random_images(2, channels=1, size=32) * 2 - 1
    weight = vae.decoder.conv_out.weight
    reconstruction = vae(pixels).sample
    error = (reconstruction - pixels).abs().mean()
    loss = adversary.loss(reconstruction, pixels, error, weight)
    wanted, asked = (torch.autograd.grad(x, weight, retain_graph=True)[0].norm() for x in (error, loss))
    assert torch.isclose(wanted, asked, rtol=0.01)
    loss.backward()
    assert all(p.grad is None for p in adversary.discriminator.parameters())


def test_opinions_are_of_patches():
    outputs = PatchDiscriminator(width=8)(torch.zeros(2, 1, 32, 40))
    assert outputs[-1].shape == (2, 1, 6, 8)
