"""Guidance as arithmetic."""

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffusers_dino.pipelines.guidance import guide, rescale_guidance


def predictions():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1, 1)
    return (torch.randn(3, 4, 8, 8, generator=generator) * scales for _ in range(2))


def test_scale_interpolates_and_extrapolates():
    null, conditional = predictions()
    assert torch.equal(guide(null, conditional, 0.0), null)
    torch.testing.assert_close(guide(null, conditional, 1.0), conditional)
    torch.testing.assert_close(guide(null, conditional, 3.0), 3 * conditional - 2 * null)


def test_full_rescale_restores_the_deviation_of_each_sample():
    null, conditional = predictions()
    guided = guide(null, conditional, 7.5)
    rescaled = rescale_guidance(guided, conditional, 1.0)
    torch.testing.assert_close(rescaled.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(
        rescaled.flatten(1) / guided.flatten(1), (rescaled / guided)[:, :1, 0, 0].expand(3, 256)
    )


def test_rescale_equals_diffusers_own():
    null, conditional = predictions()
    guided = guide(null, conditional, 7.5)
    assert torch.equal(rescale_guidance(guided, conditional, 0.0), guided)
    torch.testing.assert_close(rescale_guidance(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7))
