"""Losses that see images as a DINO encoder does."""

from functools import partial

import pytest
import torch
from torch.nn.functional import avg_pool2d

import tiny
from diffusers_dino.latents import encode_to_moments
from diffusers_dino.pixels import unit_to_vae
from diffusers_dino.training.perceptual import perceptual_distance, token_loss


def test_distance_grows_with_the_change_and_asks_only_the_reconstruction():
    images = unit_to_vae(tiny.random_images(2, channels=1), 1)
    conditioner = tiny.tiny_conditioner(tokens="all")
    distance = partial(perceptual_distance, conditioner)
    slight, strong = (images + (avg_pool2d(images, 3, stride=1, padding=1) - images) * share for share in (0.2, 0.9))
    assert distance(images, images).abs() < 1e-5
    assert 1e-4 < distance(slight, images) < distance(strong, images) < 4
    reconstruction, pixels = strong.requires_grad_(), images.requires_grad_()
    distance(reconstruction, pixels.detach()).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(p.grad is None for p in conditioner.parameters())


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.tiny_pipeline()
    pipe.vae.requires_grad_(False)
    return pipe


@torch.no_grad()
def encoded(pipe, images):
    """Latents of images, and the tokens of what the autoencoder keeps of them."""
    latents = encode_to_moments(pipe.vae, unit_to_vae(images, 1))[0]
    decoded = pipe.vae(unit_to_vae(images, 1)).sample
    return latents, pipe.conditioner.encode((decoded / 2 + 0.5).clamp(0, 1))


class Case:
    """Four images, noised; what the denoiser says with the null condition is that there is no noise."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.latents, self.tokens = encoded(pipe, tiny.random_images(4, channels=1))
        self.noise, self.timesteps = torch.randn_like(self.latents), torch.tensor([900, 100, 300, 600])
        self.noisy = pipe.scheduler.add_noise(self.latents, self.noise, self.timesteps)

    def loss(self, prediction, tokens=None, told=(True,) * 4, guidance_scale=1.0):
        tokens = self.tokens if tokens is None else tokens
        told = torch.tensor(told)
        return token_loss(
            self.pipe, self.predict, prediction, self.noisy, self.timesteps, tokens, told, guidance_scale
        )

    def predict(self, noisy, timesteps, tokens):
        assert timesteps.tolist() == [100, 300]
        assert torch.equal(tokens, self.pipe.conditioner.null_condition(2))
        return torch.zeros_like(noisy)


def test_right_predictions_have_no_token_loss_and_the_tokens_of_others_have(pipe):
    case = Case(pipe)
    others = case.tokens.roll(1, 0)
    assert case.loss(case.noise) < 1e-6 < case.loss(case.noise, others) / 100
    a = pipe.scheduler.alphas_cumprod[[100, 300]]
    errors = (case.tokens - others).square().mean((1, 2))[[1, 2]]
    torch.testing.assert_close(case.loss(case.noise, others), (a * errors).mean(), rtol=1e-3, atol=0)


def test_it_is_of_the_guided_prediction(pipe):
    case = Case(pipe)
    assert case.loss(case.noise / 2, guidance_scale=2.0) < 1e-6 < case.loss(case.noise / 2) / 100


def test_half_the_batch_with_the_least_noise_is_asked_if_it_was_told(pipe):
    case = Case(pipe)
    prediction = torch.randn_like(case.latents).requires_grad_()
    case.loss(prediction, told=(True, True, False, True)).backward()
    assert prediction.grad.abs().sum((1, 2, 3)).gt(0).tolist() == [False, True, False, False]
