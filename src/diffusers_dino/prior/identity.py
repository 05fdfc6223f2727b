"""Which conditioner a prior was trained for: its tokens mean nothing to a model with another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditioner import DinoImageConditioner
from ..fingerprints import as_json, hash_of
from ..frozen import differences
from ..seeds import generator_for

__all__ = ["describe_conditioner", "require_conditioner"]

_NUM_PROBES = 16
_TOLERANCE = 0.1  # of the probes: rounding of half precision stays below a tenth of it, other weights above
_EXACT = ("tokens", "shape", "preprocessing and architecture", "normalisation")


def describe_conditioner(conditioner: DinoImageConditioner) -> dict[str, Any]:
    """A fingerprint of all that makes the tokens what they are, for JSON: encoder, choice of tokens, normalisation.

    Where the encoder was loaded from is told and not compared. The `probe`, sixteen projections of the tokens of a
    fixed picture, serves where the precision differs, so that weights differ by rounding.
    """
    specs = as_json(conditioner.config["encoders"])
    names = [f"{spec.pop('source')}" for spec in specs]
    for spec in specs:
        del spec["revision"]
    weights = conditioner.image_encoders.state_dict().values()
    heads = sorted(conditioner.heads.state_dict().items())
    return {
        "encoder": names,
        "tokens": conditioner.config["tokens"],
        "shape": [conditioner.num_tokens, conditioner.token_dim],
        "preprocessing and architecture": hash_of(json.dumps(specs, sort_keys=True))[:16],
        "normalisation": hash_of(*(part for entry in heads for part in entry))[:16],
        "weights": hash_of(*sorted(hash_of(t.dtype, tuple(t.shape), t) for t in weights))[:16],
        "dtype": str(conditioner.dtype).removeprefix("torch."),
        "probe": [round(value, 4) for value in _probe(conditioner).tolist()],
    }


def require_conditioner(known: Mapping[str, Any] | None, conditioner: DinoImageConditioner) -> None:
    """Refuse, with a ValueError that says what differs, a conditioner other than the described one.

    `known` is what `describe_conditioner` gave; None (a prior that nobody described one for) accepts only what fits by
    shape, and that is not asked here.
    """
    if known is None:
        return
    ours = describe_conditioner(conditioner)
    lines = differences({name: known[name] for name in _EXACT}, {name: ours[name] for name in _EXACT})
    if not lines and ours["weights"] != known["weights"]:
        there, here = torch.tensor(known["probe"]), torch.tensor(ours["probe"])
        near = (there - here).norm() <= _TOLERANCE * there.norm()
        if ours["dtype"] == known["dtype"] or not near:
            lines = differences({"weights": known["weights"]}, {"weights": ours["weights"]})
    if lines:
        lines += differences({"encoder": known["encoder"]}, {"encoder": ours["encoder"]})
        raise ValueError(
            "\n- ".join(["The prior was trained on the tokens of another conditioner:", *lines])
            + "\nUse the model that it was trained for, or train a prior for this one: examples/train_prior.py."
        )


@torch.no_grad()
def _probe(conditioner: DinoImageConditioner) -> Tensor:
    """Tokens of a fixed picture along fixed directions, `(16,)` float32."""
    coarse = torch.rand(1, 1, 6, 6, generator=generator_for("probe", "picture"))
    picture = torch.nn.functional.interpolate(coarse, size=256, mode="bicubic", align_corners=False).clamp(0, 1)
    tokens = conditioner.encode(picture).float().cpu().flatten()  # (S D,)
    directions = torch.randn(_NUM_PROBES, len(tokens), generator=generator_for("probe", "directions"))
    return directions @ tokens / len(tokens) ** 0.5
