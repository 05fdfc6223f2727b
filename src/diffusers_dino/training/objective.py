"""The training objective of a latent diffusion or flow model: pure arithmetic, and the random draws it is fed with.

With `a = alphas_cumprod[t]` a noisy latent is `z_t = sqrt(a) z + sqrt(1 - a) e` (Ho et al. 2020, eq. 4), and its
signal-to-noise ratio is `a / (1 - a)`. Flow matching is in `diffusers_dino.schedules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..devices import send
from ..schedules import add_noise, is_flow
from ..seeds import generator_for

if TYPE_CHECKING:
    from ..fusion import TokenFusion

__all__ = [
    "FLOW_TIMES",
    "PREDICTION_TYPES",
    "TrainingDraws",
    "check_finite",
    "clean_latents",
    "draw_encoders",
    "draw_for_training",
    "drop_condition",
    "drop_encoders",
    "flow_timesteps",
    "min_snr_weights",
    "noisy_latents",
    "prediction_target",
    "split_prediction",
    "weighted_mse",
]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of diffusion; a flow has one target
FLOW_TIMES = ("logit_normal", "uniform")


@dataclass(frozen=True)
class TrainingDraws:
    """All that is random in one batch of training.

    Attributes:
        noise: `(B, L, h, w)`, what is added to the latents.
        latent_noise: `(B, L, h, w)`, what samples the autoencoder's posterior: `mean + std * latent_noise`.
        timesteps: `(B,)` int64 in [0, num_train_timesteps).
        drop: `(B,)` uniform on [0, 1): the condition is dropped where it is below the probability.
        level: `(B,)` standard normal, which becomes the time of a flow.
    """

    noise: Tensor
    latent_noise: Tensor
    timesteps: Tensor
    drop: Tensor
    level: Tensor

    def to(self, device: torch.device | str) -> TrainingDraws:
        """The same draws on a device, which the host does not wait for."""
        return TrainingDraws(*(send(getattr(self, field.name), device) for field in fields(self)))


def draw_for_training(
    positions: Sequence[int],
    latent_shape: tuple[int, int, int],
    num_train_timesteps: int,
    seed: int = 0,
    noise_offset: float = 0.0,
) -> TrainingDraws:
    """Draw for a batch; each sample's draws depend only on (seed, its global position).

    Args:
        positions: The B places in the global order of the run (see `GlobalBatchSampler`).
        latent_shape: `(L, h, w)`.
        num_train_timesteps: Number of timesteps of the schedule.
        seed: Seed of the run.
        noise_offset: Strength of an extra noise that is constant over each channel, so that a model learns to move
            an image's mean brightness (Guttenberg 2023).

    Returns:
        The draws, on the CPU and therefore the same on every device.
    """
    draws = []
    for position in positions:
        generator = generator_for(seed, "objective", position)
        timestep = torch.randint(num_train_timesteps, (), generator=generator)
        drop = torch.rand((), generator=generator)
        noise, latent_noise = torch.randn(2, *latent_shape, generator=generator)
        offset = torch.randn(latent_shape[0], 1, 1, generator=generator)
        level = torch.randn((), generator=generator)
        noise = noise + noise_offset * offset if noise_offset else noise
        draws.append((noise, latent_noise, timestep, drop, level))
    return TrainingDraws(*(torch.stack(column) for column in zip(*draws, strict=True)))


def noisy_latents(
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler,
    latents: Tensor,
    draws: TrainingDraws,
    flow_times: str = "logit_normal",
) -> tuple[Tensor, Tensor]:
    """Noise latents `(B, L, h, w)` as a denoiser sees them, and timesteps `(B,)`, a flow's by `flow_timesteps`."""
    if not is_flow(scheduler):
        return scheduler.add_noise(latents, draws.noise, draws.timesteps), draws.timesteps
    timesteps = flow_timesteps(scheduler, draws.level, flow_times)
    return add_noise(scheduler, latents, draws.noise, timesteps), timesteps


def flow_timesteps(scheduler: FlowMatchEulerDiscreteScheduler, level: Tensor, times: str = "logit_normal") -> Tensor:
    """Timesteps of a flow's training (Esser et al., arXiv 2403.03206, sections 3.1 and 5.3.2).

    Args:
        scheduler: Its `shift` moves the times towards noise, which large images need: `shift s / (1 + (shift - 1) s)`.
        level: `(B,)` standard normal.
        times: `"logit_normal"`, with location 0 and scale 1, or `"uniform"`.

    Returns:
        `(B,)` float32 in [0, num_train_timesteps].
    """
    if times not in FLOW_TIMES:
        raise ValueError(f"The times of a flow must be one of {', '.join(FLOW_TIMES)}, got {times!r}.")
    s = level.sigmoid() if times == "logit_normal" else torch.special.ndtr(level)
    shift = scheduler.config["shift"]
    return shift * s / (1 + (shift - 1) * s) * scheduler.config["num_train_timesteps"]


def prediction_target(
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the denoiser is to predict from noisy latents, as the scheduler's config says.

    For `epsilon` the noise, for `sample` the clean latents, for `v_prediction` (Salimans & Ho 2022)
    `sqrt(a) e - sqrt(1 - a) z`, for a flow the velocity `e - z`.

    Raises:
        ValueError: If the prediction type is unknown.
    """
    if is_flow(scheduler):
        return noise - latents
    prediction_type = scheduler.config["prediction_type"]
    _check_prediction_type(prediction_type)
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise if prediction_type == "epsilon" else latents


def split_prediction(prediction: Tensor, noisy: Tensor, a: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """What a prediction of diffusion says of clean latents and noise, all `(B, L, h, w)`; `a` is `(B, 1, 1, 1)`."""
    signal, sigma = a.sqrt(), (1 - a).sqrt()
    if prediction_type == "v_prediction":
        return signal * noisy - sigma * prediction, sigma * noisy + signal * prediction
    if prediction_type == "sample":
        return prediction, (noisy - signal * prediction) / sigma
    return (noisy - sigma * prediction) / signal, prediction


def clean_latents(
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler, prediction: Tensor, noisy: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """What a prediction says of the clean latents, `(B, L, h, w)`, and how much of the noisy ones' variance is signal.

    The second is `(B,)` in [0, 1]: `a` of diffusion, `(1 - s)^2 / ((1 - s)^2 + s^2)` of a flow.
    """
    if is_flow(scheduler):
        s = timesteps / scheduler.config["num_train_timesteps"]
        return noisy - s.view(-1, 1, 1, 1) * prediction, (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    a = scheduler.alphas_cumprod.to(noisy)[timesteps]
    return split_prediction(prediction, noisy, a.view(-1, 1, 1, 1), scheduler.config["prediction_type"])[0], a


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma weights of the loss (Hang et al. 2023), `min(SNR, gamma)` in the units of the clean latent.

    The weight is divided by SNR for `epsilon` and by SNR + 1 for `v_prediction`. It is written in `a` rather than in
    the ratio `a / (1 - a)`, so that zero and infinite ratios have their limits: for `v_prediction` it is
    `min(a, gamma (1 - a))`.

    Args:
        alphas_cumprod: `(B,)` in [0, 1].
        gamma: Where the weight is cut; 5 in the paper.
        prediction_type: One of `PREDICTION_TYPES`.

    Returns:
        `(B,)`, finite.

    Raises:
        ValueError: If gamma is not positive or the prediction type is unknown.
    """
    _check_prediction_type(prediction_type)
    if gamma <= 0:
        raise ValueError(f"The min-SNR gamma must be positive, got {gamma}.")
    a = alphas_cumprod
    if prediction_type == "epsilon":
        return (gamma * (1 - a) / a).clamp(max=1)
    if prediction_type == "v_prediction":
        return torch.minimum(a, gamma * (1 - a))
    return (a / (1 - a)).clamp(max=gamma)


def drop_condition(tokens: Tensor, null_tokens: Tensor, drop: Tensor, probability: float) -> Tensor:
    """Replace the condition of some samples by the null condition, for guidance (Ho & Salimans 2022).

    The tokens are `(B, S, D)`, the null tokens too or `(1, S, D)`, and `drop` `(B,)` is uniform on [0, 1).
    """
    return torch.where((drop < probability).view(-1, 1, 1), null_tokens.to(tokens), tokens)


def draw_encoders(positions: Sequence[int], num_encoders: int, probability: float, seed: int = 0) -> Tensor:
    """Which of its encoders each sample keeps, where each is left out with a probability: `(B, E)` bool.

    A sample whose encoders would all go keeps one of them, each as often: to see none is what `drop_condition` is for.
    As in `draw_for_training`, a sample's draws depend only on (seed, its global position).
    """
    draws = [torch.rand(num_encoders, generator=generator_for(seed, "encoders", position)) for position in positions]
    table = torch.stack(draws)
    return (table >= probability) | (table == table.amax(dim=1, keepdim=True))


def drop_encoders(
    tokens: Tensor, null_tokens: Tensor, positions: Sequence[int], fusion: TokenFusion, seed: int = 0
) -> Tensor:
    """Put the null condition in the place of the tokens of encoders that a sample does not keep, as `draw_encoders`.

    The tokens are `(B, S, D)`, the null tokens too or `(1, S, D)`.
    """
    counts = fusion.config["tokens_per_encoder"]
    kept = draw_encoders(positions, len(counts), fusion.config["encoder_dropout"], seed)
    kept = kept.repeat_interleave(torch.tensor(counts), dim=1)  # (B, S), before it goes to a GPU
    return torch.where(send(kept, tokens.device)[..., None], tokens, null_tokens.to(tokens))


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample `(B, L, h, w)` in float32, weighted by `(B,)`: a scalar."""
    errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # (B,)
    return (errors if weights is None else errors * weights).mean()


def check_finite(step: int, loss: float, norm: Tensor | float, keys: Sequence[str], mixed_precision: str) -> None:
    """Refuse an update before it touches the weights: FloatingPointError that names some samples.

    Under fp16 gradients may overflow: then the scaler leaves the update out and lowers its scale.
    """
    if not math.isfinite(loss) or (mixed_precision != "fp16" and not math.isfinite(norm)):
        raise FloatingPointError(
            f"Update {step}: the loss is {loss}, the gradient's norm {norm:.3g}. No weight was changed. "
            f"Images at hand: {', '.join(keys[:4])}. Lower the learning rate or use bf16 rather than fp16, and resume "
            "from the latest checkpoint."
        )


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"The prediction type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}.")
