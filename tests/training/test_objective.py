import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from diffusers_dino.training.objective import (
    PREDICTION_TYPES,
    clean_latents,
    draw_for_training,
    drop_condition,
    flow_timesteps,
    min_snr_weights,
    noisy_latents,
    prediction_target,
    weighted_mse,
)

SHAPE = (4, 8, 8)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_draws_depend_on_seed_and_position_alone():
    together = draw_for_training([3, 7, 100], SHAPE, 1000, seed=1)
    alone = draw_for_training([7], SHAPE, 1000, seed=1)
    for name in ("noise", "latent_noise", "timesteps", "drop", "level"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    other = draw_for_training([7], SHAPE, 1000, seed=2)
    assert not torch.equal(alone.noise, other.noise)
    assert not torch.equal(alone.noise, alone.latent_noise)


def test_draws_have_their_distributions():
    draws = draw_for_training(range(4000), (1, 4, 4), 10)
    assert draws.noise.mean().abs() < 0.02
    assert abs(draws.noise.std() - 1) < 0.02
    counts = torch.bincount(draws.timesteps, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300
    assert 0 <= draws.drop.min() < draws.drop.max() < 1
    assert draws.level.mean().abs() < 0.05
    assert abs(draws.level.std() - 1) < 0.05


def test_a_flow_is_a_straight_line_and_its_velocity(latents):
    scheduler = FlowMatchEulerDiscreteScheduler()
    draws = draw_for_training(range(5), SHAPE, 1000)
    noisy, timesteps = noisy_latents(scheduler, latents, draws)
    velocity = prediction_target(scheduler, latents, draws.noise, timesteps)
    s = (timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - s * velocity, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(noisy + (1 - s) * velocity, draws.noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["flow", *PREDICTION_TYPES])
def test_a_right_prediction_gives_the_clean_latents_and_their_share(latents, kind):
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDIMScheduler(prediction_type=kind)
    draws = draw_for_training(range(5), SHAPE, 1000)
    noisy, timesteps = noisy_latents(scheduler, latents, draws)
    clean, share = clean_latents(
        scheduler, prediction_target(scheduler, latents, draws.noise, timesteps), noisy, timesteps
    )
    torch.testing.assert_close(clean, latents, atol=1e-3, rtol=0)
    signal, sigma = (noisy_latents(scheduler, one, draws)[0] for one in (latents, 0 * latents))
    signal = (signal - sigma) / latents
    sigma = sigma / draws.noise
    torch.testing.assert_close(share, (signal**2 / (signal**2 + sigma**2)).mean((1, 2, 3)), atol=1e-4, rtol=0)


def test_times_of_a_flow_have_their_distributions():
    level = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    uniform = flow_timesteps(FlowMatchEulerDiscreteScheduler(), level, "uniform") / 1000
    for quantile in (0.1, 0.5, 0.9):
        assert abs((uniform < quantile).float().mean() - quantile) < 0.01
    normal = flow_timesteps(FlowMatchEulerDiscreteScheduler(), level) / 1000
    torch.testing.assert_close(normal.logit().std(), torch.ones(()), atol=0.02, rtol=0)
    shifted = flow_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), level) / 1000
    torch.testing.assert_close(shifted, 3 * normal / (1 + 2 * normal))
    with pytest.raises(ValueError, match="logit_normal, uniform"):
        flow_timesteps(FlowMatchEulerDiscreteScheduler(), level, "cosine")


def test_noise_offset_moves_whole_channels():
    plain = draw_for_training([0, 1], SHAPE, 1000)
    offset = draw_for_training([0, 1], SHAPE, 1000, noise_offset=0.1)
    difference = offset.noise - plain.noise
    assert difference.std(dim=(2, 3)).max() < 1e-6
    assert difference.mean(dim=(2, 3)).abs().min() > 1e-4
    assert torch.equal(plain.latent_noise, offset.latent_noise)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_agrees_with_its_definition_and_is_finite_at_its_limits(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps).double()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    weights = min_snr_weights(scheduler.alphas_cumprod, 5.0, prediction_type)
    torch.testing.assert_close(weights.double(), snr.clamp(max=5) / divisor, rtol=1e-3, atol=1e-6)
    limits = min_snr_weights(torch.tensor([0.0, 1.0]), 5.0, prediction_type)
    expected = {"epsilon": [1.0, 0.0], "v_prediction": [0.0, 0.0], "sample": [0.0, 5.0]}[prediction_type]
    assert limits.tolist() == expected
    for gamma in (0, -1):
        with pytest.raises(ValueError, match="gamma must be positive"):
            min_snr_weights(torch.ones(1), gamma, prediction_type)


def test_dropped_conditions_become_the_null_condition():
    tokens, null = torch.ones(4, 3, 2), torch.full((1, 3, 2), 7.0)
    dropped = drop_condition(tokens, null, torch.tensor([0.05, 0.1, 0.5, 0.0]), 0.1)
    assert dropped[:, 0, 0].tolist() == [7.0, 1.0, 1.0, 7.0]
    assert torch.equal(drop_condition(tokens, null, torch.zeros(4), 0.0), tokens)
    assert (drop_condition(tokens, null, torch.full((4,), 0.999), 1.0) == 7).all()


def test_weighted_loss_is_the_mean_over_samples_in_float32(latents):
    target = torch.zeros_like(latents)
    torch.testing.assert_close(weighted_mse(latents, target), latents.square().mean())
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(weighted_mse(latents, target, weights), latents[0].square().mean() / 5)
    assert weighted_mse(latents.half(), target.half()).dtype == torch.float32


def test_target_is_what_the_schedule_predicts(latents):
    noise, timesteps = torch.randn_like(latents), torch.tensor([0, 1, 500, 998, 999])
    targets = {}
    for prediction_type in (*PREDICTION_TYPES, "noise"):
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
        if prediction_type != "noise":
            targets[prediction_type] = prediction_target(scheduler, latents, noise, timesteps)
    assert targets["epsilon"] is noise
    assert targets["sample"] is latents
    a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(targets["v_prediction"], a.sqrt() * noise - (1 - a).sqrt() * latents)
    with pytest.raises(ValueError, match="one of epsilon, v_prediction, sample, got 'noise'"):
        prediction_target(scheduler, latents, noise, timesteps)
