"""State of a training as safetensors: tensors, and around them what JSON can hold. Reading it runs no code."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = [
    "OPTIMIZER",
    "load_optimizer",
    "random_states",
    "read_state",
    "save_optimizer",
    "set_random_states",
    "write_state",
]

OPTIMIZER = "optimizer.safetensors"
_ENTRY = "state"


def write_state(path: str | Path, state: Any) -> None:
    """Write nested dictionaries, lists and tuples of tensors, numbers and texts; TypeError for anything else."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_take_apart(state, tensors, {}))
    save_file(tensors, path, {_ENTRY: structure})


def read_state(path: str | Path) -> Any:
    """What `write_state` was given, with tensors on the CPU; ValueError if the file does not hold such a state."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
            return _put_together(json.loads((file.metadata() or {})[_ENTRY]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the state of a training: {error!r}") from error


def _take_apart(value: Any, tensors: dict[str, Tensor], names: dict[tuple, str]) -> Any:
    """A value as JSON, its tensors by name. A tensor that is there several times, as tables are, is stored once."""
    if isinstance(value, Tensor):
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else (len(names),)
        if identity not in names:
            names[identity] = str(len(names))
            kept = value.detach().cpu().contiguous()
            is_view = kept.untyped_storage().nbytes() != kept.numel() * kept.element_size()
            tensors[names[identity]] = kept.clone() if is_view else kept
        return {"tensor": names[identity]}
    if isinstance(value, dict):
        return {"items": [[_take_apart(part, tensors, names) for part in item] for item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take_apart(part, tensors, names) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A {type(value).__name__} cannot be part of a checkpoint: only tensors, numbers and texts can.")


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in content}
    return {"list": list, "tuple": tuple}[kind](_put_together(part, tensors) for part in content)


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler, **further: Any) -> None:
    """Write the state of an optimizer, of its schedule, and what else belongs to it, into a checkpoint."""
    state = {"optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict(), **further}
    write_state(folder / OPTIMIZER, state)


def load_optimizer(optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Take up moments and place in the schedule; rate, decay and the like stay those that were asked for now.

    `state` is what `save_optimizer` wrote. ValueError if it is that of an optimizer of another kind.
    """
    asked = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    rates = list(lr_scheduler.base_lrs)
    optimizer.load_state_dict(state["optimizer"])
    for parameter, moments in optimizer.state.items():  # fused kernels go through memory, where both must be in order
        for name, value in moments.items():
            out_of_order = isinstance(value, Tensor) and value.stride() != parameter.stride()
            if out_of_order and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    closed = isinstance(lr_scheduler, LambdaLR)  # as all of diffusers': the rate follows from the number of updates
    for number, (group, own) in enumerate(zip(optimizer.param_groups, asked, strict=True)):
        group.update({name: value for name, value in own.items() if closed or name not in ("lr", "initial_lr")})
        if closed:
            group["lr"] = rates[number] * lr_scheduler.lr_lambdas[number](lr_scheduler.last_epoch)
    if closed:
        lr_scheduler.base_lrs = rates
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def random_states() -> dict[str, Any]:
    """The states of all generators that a library may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Take up what `random_states` gave; those of GPUs only if there are as many as there were."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
