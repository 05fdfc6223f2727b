"""Standardised latents of every autoencoder, and back."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tiny
from diffusers_dino.latents import decode_latents, encode_to_moments, standardize, vae_scale_factor

AUTOENCODERS = {
    "plain": lambda: tiny.tiny_vae(3),
    "gray": lambda: tiny.tiny_vae(1),
    "shifted": lambda: tiny.tiny_vae(3, shift_factor=0.3),
    "per channel": lambda: tiny.tiny_vae(
        3, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5], scaling_factor=0.13025
    ),
    "tiny": lambda: tiny.tiny_taesd(3),
    "tiny gray": lambda: tiny.tiny_taesd(1),
}


@pytest.fixture(params=AUTOENCODERS, scope="module")
def vae(request):
    return AUTOENCODERS[request.param]().requires_grad_(False)


def pixels_for(vae, count=3):
    return tiny.random_images(count, channels=vae.config.in_channels) * 2 - 1


def raw_latents(vae, pixels):
    encoded = vae.encode(pixels)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean


def test_scale_factor_is_what_encoding_does(vae):
    pixels = pixels_for(vae)
    mean, std = encode_to_moments(vae, pixels)
    assert mean.shape == std.shape == (3, 4, 32 // vae_scale_factor(vae), 32 // vae_scale_factor(vae))


def test_decoding_undoes_standardising(vae):
    pixels = pixels_for(vae)
    direct = vae.decode(raw_latents(vae, pixels)).sample
    mean, _ = encode_to_moments(vae, pixels)
    torch.testing.assert_close(decode_latents(vae, mean), direct, atol=1e-5, rtol=1e-5)


def test_moments_are_those_of_standardised_samples(vae):
    pixels = pixels_for(vae, 1)
    mean, std = encode_to_moments(vae, pixels)
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latents"):
        assert not std.any()
        torch.testing.assert_close(mean, standardize(vae, encoded.latents))
        return
    generator = torch.Generator().manual_seed(0)
    samples = torch.cat([standardize(vae, encoded.latent_dist.sample(generator)) for _ in range(2000)])
    torch.testing.assert_close(samples.mean(0, keepdim=True), mean, atol=0.12 * float(std.max()), rtol=0)
    torch.testing.assert_close(samples.std(0, keepdim=True), std, atol=0, rtol=0.12)


def test_constants_of_stable_diffusion_xls_and_3s_conventions():
    latents = torch.ones(1, 4, 2, 2)
    per_channel = AUTOENCODERS["per channel"]()
    expected = (torch.tensor([0.9, 1.2, 0.7, 1.0]) * 0.13025 / torch.tensor([0.5, 1.0, 2.0, 1.5])).view(1, 4, 1, 1)
    torch.testing.assert_close(standardize(per_channel, latents), expected.expand_as(latents))
    shifted = standardize(AUTOENCODERS["shifted"](), latents)
    torch.testing.assert_close(shifted, torch.full_like(latents, 0.7 * 0.5))


def test_scale_factor_agrees_with_stable_diffusions_pipeline():
    vae = tiny.tiny_vae(3)
    reference = StableDiffusionPipeline(vae, None, None, None, None, None, None, requires_safety_checker=False)
    assert vae_scale_factor(vae) == reference.vae_scale_factor == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    vae = AUTOENCODERS["per channel"]().to(dtype)
    mean, std = encode_to_moments(vae, pixels_for(vae).to(dtype))
    assert mean.dtype == std.dtype == decode_latents(vae, mean).dtype == dtype


def test_gradients_pass():
    vae = tiny.tiny_vae(1)
    pixels = pixels_for(vae).requires_grad_(True)
    mean, _ = encode_to_moments(vae, pixels)
    decode_latents(vae, mean).square().mean().backward()
    assert pixels.grad.abs().sum() > 0
