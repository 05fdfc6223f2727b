"""The autoencoder's loss, its quality measure, and the statistics of its latents."""

import math

import pytest
import torch

from diffusers_dino.training.autoencoder import ReconstructionLoss, gradient_l1, latent_statistics, psnr


def test_loss_is_the_sum_of_its_terms():
    x, y = torch.rand(2, 2, 1, 8, 8)
    mean, logvar = torch.randn(2, 2, 4, 2, 2)
    nothing = {"l1": 0, "mse": 0, "gradient": 0, "kl": 0}
    terms = [
        ReconstructionLoss(**{**nothing, "l1": 1.0, "kl": 0.0})(x, y, mean, logvar),
        2 * ReconstructionLoss(**{**nothing, "mse": 1.0})(x, y, mean, logvar),
        3 * ReconstructionLoss(**{**nothing, "gradient": 1.0})(x, y, mean, logvar),
    ]
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).mean()
    loss = ReconstructionLoss(l1=1, mse=2, gradient=3, kl=4)(x, y, mean, logvar)
    assert torch.allclose(loss, sum(terms) + 4 * divergence, rtol=1e-5)


def test_loss_of_a_perfect_reconstruction_with_unit_latents_is_zero():
    x = torch.rand(2, 3, 8, 8)
    latents = torch.zeros(2, 4, 2, 2)
    assert ReconstructionLoss()(x, x, latents, latents) == 0


def test_gradient_term_ignores_brightness_and_sees_edges():
    x = torch.rand(1, 1, 8, 8)
    assert gradient_l1(x + 0.3, x) < 1e-6
    edge = x.clone()
    edge[..., 4:] += 1  # one step of height 1 between columns 3 and 4: 8 of 8 * 7 differences
    assert math.isclose(gradient_l1(edge, x).item(), 1 / 7, rel_tol=1e-5)


@pytest.mark.parametrize("weights", [{"l1": -1.0}, {"l1": 0.0, "mse": 0.0, "gradient": 0.0}])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"negative|positive"):
        ReconstructionLoss(**weights)


def test_psnr_of_a_constant_error():
    x = torch.full((2, 1, 4, 4), 0.5)
    assert torch.allclose(
        psnr(x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1), x), torch.tensor([20.0, 40.0]), atol=1e-3
    )
    assert psnr(x, x).tolist() == [100.0, 100.0]


def test_latent_statistics_are_those_of_drawn_latents():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 2, 8, 8, generator=generator) * torch.tensor([3.0, 0.5]).view(2, 1, 1) + 1
    std = torch.full_like(mean, 0.7)
    drawn = mean + std * torch.randn(mean.shape, generator=generator)
    got_mean, got_std = latent_statistics(zip(mean.split(16), std.split(16), strict=True))
    assert torch.allclose(torch.tensor(got_mean), drawn.mean((0, 2, 3)), atol=0.05)
    assert torch.allclose(torch.tensor(got_std), drawn.std((0, 2, 3)), rtol=0.02)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ([], "at least one batch"),
        ([(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))], "does not vary"),
        ([(torch.full((2, 1, 2, 2), math.nan), torch.zeros(2, 1, 2, 2))], "not finite"),
    ],
)
def test_latents_without_statistics_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        latent_statistics(moments)
