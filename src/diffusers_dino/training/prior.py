"""The objective of a prior, and when to stop: a loss on fixed draws of held-out images, and their tokens' distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..data import Slot, load_batches
from ..files import save_atomically, write_json
from ..metrics.distances import frechet_of_samples
from ..metrics.neighbours import evenly_spread
from ..pipelines import DinoPriorPipeline
from ..prior import Condition, DinoPrior, PriorConditions
from ..prior.flow import FlowDraws, add_noise, draw_for_prior
from ..prior.table import Facts, encode_facts
from ..seeds import derive_seed, generator_for
from .features import FeatureEncoder, Views
from .state import TrainingState

__all__ = [
    "HeldOut",
    "KnownFacts",
    "PriorValidator",
    "drop_facts",
    "encode_tokens",
    "prior_losses",
    "split_held_out",
]

_TOGETHER = 64
_STEPS = 10  # of sampling, in a look: the flow is nearly straight, and a look is not to cost more than training


class KnownFacts:
    """The conditions of a training's images, by key.

    Args:
        keys: Of the images.
        facts: Of each.
        conditions: The prior's vocabulary.
        read: Texts to tokens `(B, T, Dt)` and mask `(B, T)`, for a prior with text; texts are read when they are asked
            for, since their tokens can be larger than the images'.
    """

    def __init__(
        self,
        keys: Sequence[str],
        facts: Sequence[Facts],
        conditions: PriorConditions,
        read: Callable[[list[str | None]], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._row_of = {key: row for row, key in enumerate(keys)}
        self._condition = encode_facts(facts, keys, conditions)
        self._texts = [own.text for own in facts]
        self._read = read if conditions.text_dim is not None else None

    def of(self, keys: Sequence[str]) -> Condition:
        """What is known of these images."""
        rows = [self._row_of[key] for key in keys]
        condition = self._condition.rows(torch.tensor(rows))
        if self._read is None:
            return condition
        text, mask = self._read([self._texts[row] for row in rows])
        return condition._replace(text=text, text_mask=mask)


class HeldOut(NamedTuple):
    """Images that a prior does not learn from: tokens `(N, S, D)`, and what is known of them."""

    tokens: Tensor
    condition: Condition


@torch.no_grad()
def encode_tokens(views: Views, encode: FeatureEncoder, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Tokens `(N, S, D)` float32 on the CPU of some images in their first view, and keys of what was shown."""
    slots = [Slot(0, 0, index) for index in indices]
    blocks = [slots[first : first + _TOGETHER] for first in range(0, len(slots), _TOGETHER)]
    tokens, keys = [], []
    for batch in load_batches(views, blocks, 0, encode.device):
        tokens.append(encode(batch).tokens.cpu())
        keys += batch["key"]
    return torch.cat(tokens), keys


def split_held_out(keys: Sequence[str], patients: Sequence[str | None], share: float, seed: int) -> list[bool]:
    """Which images to hold out: about this share of the patients, chosen by their names.

    An image without a patient counts as one. ValueError if the share is not in [0, 1), or leaves fewer than 16 images
    on one side.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share of held-out images must be in [0, 1), got {share}.")
    names = [patient or key for key, patient in zip(keys, patients, strict=True)]
    chosen = [derive_seed(seed, "held out", name) < share * 2**63 for name in names]
    sizes = sum(chosen), len(chosen) - sum(chosen)
    if share and min(sizes) < 16:
        raise ValueError(
            f"{share:.0%} of {len(keys)} images are {sizes[0]} to hold out and {sizes[1]} to train on: each needs 16. "
            "Give more images, another share, or --validation_data_dir."
        )
    return chosen


def prior_losses(model: nn.Module, tokens: Tensor, condition: Condition, draws: FlowDraws) -> Tensor:
    """Squared error of the predicted velocity for standardised tokens `(B, S, D)`: `(B,)` float32."""
    noisy = add_noise(tokens, draws.noise, draws.times)
    prediction = model(noisy, 1000 * draws.times, condition)
    return (prediction.float() - (draws.noise - tokens)).square().mean(dim=(1, 2))


def drop_facts(condition: Condition, draws: FlowDraws, dropout: float, label_dropout: float) -> Condition:
    """Forget the condition of some images, and single labels of others.

    An image loses a random share of its labels, between none and twice `label_dropout`: so a prior can be asked with
    one label known, with all, or with any of them.
    """
    share = (2 * label_dropout * draws.drop_share)[:, None]
    return condition.drop(draws.drop < dropout, draws.drop_labels < share)


@dataclass(frozen=True)
class Look:
    """What a validation says after `step` updates: the loss, and the Fréchet distance of drawn to held-out tokens."""

    step: int
    loss: float
    frechet: float


class PriorValidator:
    """Measures the averaged weights on held-out images, keeps the best ones, and says when to stop.

    The loss is that of fixed noise and times, so that two looks differ only by the weights: for flow matching, a proxy
    of the likelihood. `validation.json` holds all looks, the one after 0 updates being that of a Gaussian, and the
    distance of training tokens to held-out ones, which no prior should beat by much. The best weights go to `best/`.
    Every process must call `run`.

    Args:
        pipe: The prior in training, with its `state`.
        held_out: Images that are not trained on; a view of the training images of the same number is `reference`.
        output_dir: Folder of the run.
        reference: Training tokens `(N, S, D)`.
        every: Updates between looks; 0 never looks.
        patience: Looks without a lower loss after which to stop; 0 never stops.
        num_images: Held-out images to look at, at most, spread evenly over them.
        num_draws: Noise and times for each image.
        seed: Of the draws.
    """

    def __init__(
        self,
        pipe: DinoPriorPipeline,
        state: TrainingState,
        held_out: HeldOut | None,
        output_dir: str | Path,
        *,
        reference: Tensor,
        every: int = 250,
        patience: int = 8,
        num_images: int = 256,
        num_draws: int = 8,
        seed: int = 0,
    ) -> None:
        if held_out is not None:
            rows = evenly_spread(len(held_out.tokens), num_images)
            held_out = HeldOut(held_out.tokens[rows], held_out.condition.rows(rows))
        self.pipe, self.state, self.held_out, self.seed = pipe, state, held_out, seed
        self.output_dir = Path(output_dir)
        self.every = every if held_out is not None else 0
        self.patience, self.num_draws = patience, num_draws
        self.looks: list[Look] = []
        if self.every:
            prior: DinoPrior = pipe.prior
            real = prior.standardise(held_out.tokens).flatten(1)
            known = prior.standardise(reference[evenly_spread(len(reference), len(real))]).flatten(1)
            self._real = real
            self._controls = {"training to held-out tokens": frechet_of_samples(known, real)}

    @property
    def best(self) -> Look | None:
        """The look of the lowest loss, the earliest of equals."""
        return min(self.looks, key=lambda look: look.loss, default=None)

    def state_dict(self) -> list[dict[str, Any]]:
        """What a checkpoint has to note, for JSON."""
        return [asdict(look) for look in self.looks]

    def load_state_dict(self, looks: Sequence[dict[str, Any]]) -> None:
        """Go on from a checkpoint."""
        self.looks = [Look(**look) for look in looks]

    def is_due(self, step: int) -> bool:
        """Whether there is something to do after this update."""
        return bool(self.every) and step % self.every == 0

    def run(self, step: int, say: Callable[[str], None] = print) -> bool:
        """Do what is due after this update. Returns whether to stop: the loss has not fallen for `patience` looks."""
        if not self.is_due(step):
            return False
        accelerator, before = self.state.accelerator, self.best
        found: list[Look | None] = [None]
        if accelerator.is_main_process:
            with self.state.averaged_weights():
                found = [Look(step, *self.measure())]
        look = broadcast_object_list(found)[0]
        self.looks.append(look)
        better = before is None or look.loss < before.loss
        if accelerator.is_main_process:
            self._note(look, better)
        accelerator.log({"validation_loss": look.loss, "token_frechet": look.frechet}, step=step)
        control = self._controls["training to held-out tokens"]
        say(
            f"validation after {step} updates: loss {look.loss:.4f}{', the best so far' if better else ''}; Fréchet "
            f"distance of tokens {look.frechet:.4g} (training to held-out tokens {control:.4g})"
        )
        if self.is_late():
            say(f"Stopping: the validation loss has not fallen since update {self.best.step}.")
        return self.is_late()

    def is_late(self) -> bool:
        """Whether the loss has not fallen for `patience` looks."""
        if not self.patience or not self.looks:
            return False
        return sum(look.step > self.best.step for look in self.looks) >= self.patience

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Loss and Fréchet distance of the weights as they are now."""
        prior, device = self.pipe.prior, self.state.accelerator.device
        losses = []
        for rows, tokens, condition in self._batches(device):
            for draw in range(self.num_draws):
                positions = [row * self.num_draws + draw for row in rows]
                draws = self._draws(positions).to(device)
                losses.append(prior_losses(prior, tokens, condition, draws).double().cpu())
        drawn = []
        for rows, _, condition in self._batches(device):
            noise = torch.stack([self._noise(row) for row in rows])
            tokens = self.pipe(condition=condition, latents=noise, num_inference_steps=_STEPS).image_embeds
            drawn.append(prior.standardise(tokens).flatten(1).cpu())
        return torch.cat(losses).mean().item(), frechet_of_samples(torch.cat(drawn), self._real)

    def _draws(self, positions: list[int]) -> FlowDraws:
        shape, labels = self.pipe.prior.token_shape, len(self.pipe.labels)
        return draw_for_prior(positions, shape, labels, self.seed, "uniform", "prior validation")

    def _noise(self, row: int) -> Tensor:
        return torch.randn(self.pipe.prior.token_shape, generator=generator_for(self.seed, "prior look", row))

    def _batches(self, device: torch.device) -> Iterator[tuple[list[int], Tensor, Condition]]:
        held, prior = self.held_out, self.pipe.prior
        for first in range(0, len(held.tokens), _TOGETHER):
            rows = list(range(first, min(first + _TOGETHER, len(held.tokens))))
            tokens = prior.standardise(held.tokens[rows].to(device))
            yield rows, tokens, held.condition.rows(torch.tensor(rows)).to(device)

    def _note(self, look: Look, better: bool) -> None:
        if not math.isfinite(look.loss):
            raise FloatingPointError(f"The validation loss after {look.step} updates is {look.loss}.")
        write_json(
            self.output_dir / "validation.json",
            {"num_images": len(self.held_out.tokens), "controls": self._controls, "looks": self.state_dict()},
        )
        if better:
            with save_atomically(self.output_dir / "best") as folder:
                self.state.save_for_use(folder)
                write_json(folder / "metric.json", asdict(look))
