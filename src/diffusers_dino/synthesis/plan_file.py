"""A plan in the folder of its set: `plan.json` for people, `plan.safetensors` for the rows, and a digest of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..data.stores.archives import PackedKeys
from ..files import atomic_write, read_json, write_json
from ..fingerprints import hash_of
from ..frozen import require_same
from .pairs import check_exponent
from .plan import Plan, SynthesisError, SynthesisSettings

__all__ = ["PLAN", "begun_threads", "check_free", "freeze_plan", "load_plan", "save_plan"]

PLAN = "plan.json"

_ROWS = "plan.safetensors"
_FORMAT, _SOFT = 1, 2  # the second has soft labels, which older versions cannot read
# What may lie in the folder of a new set: the rows of a run that was killed before it wrote PLAN, and what its owner
# keeps there. Hidden files may, too.
_BESIDES = (_ROWS, "gate.safetensors", "*.yaml", "*.yml", "*.log", "*.out", "*.err")


def save_plan(plan: Plan, folder: str | Path) -> None:
    """Write a plan; the same plan gives the same bytes. `plan.json` comes last: without it there is no plan."""
    folder = Path(folder)
    with atomic_write(folder / _ROWS) as file:
        file.write(save(plan.columns()))
    number = _FORMAT if plan.exponent is None else _SOFT
    write_json(folder / PLAN, {"format": number, "digest": plan.digest, **plan.describe()})


def load_plan(folder: str | Path) -> Plan:
    """Read what `save_plan` wrote; SynthesisError if it was changed since, is damaged, or of another format."""
    folder = Path(folder)
    try:
        content = read_json(folder / PLAN)
        if content["format"] not in (_FORMAT, _SOFT):
            raise SynthesisError(
                f"{folder / PLAN} is of format {content['format']}, this version reads {_FORMAT} and {_SOFT}."
            )
        if (folder / _ROWS).exists() and not (folder / _ROWS).is_file():
            raise ValueError(f"{_ROWS} is not a file")
        rows = load_file(folder / _ROWS)
        plan = Plan(
            content["strategy"],
            content["seed"],
            SynthesisSettings(**content["settings"]),
            PackedKeys.from_bytes(rows["keys"].tobytes()),
            tuple(map(tuple, content["label_sets"])),
            rows["sources"],
            rows["fractions"],
            rows["labels"],
            content["made_with"],
            content.get("exponent"),
        )
        if plan.digest != content["digest"]:
            raise SynthesisError(
                f"The plan in {folder} was changed after it was frozen: it no longer has its digest "
                f"{str(content['digest'])[:16]}. Restore {PLAN} and {_ROWS}; for another plan give another output "
                "folder."
            )
        _check_rows(plan)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no plan in {folder}: {error.filename or error} is missing.") from error
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, SynthesisError):
            raise
        raise SynthesisError(f"The plan in {folder} is damaged: {error!r}. Restore it, or begin anew.") from error
    return plan


def freeze_plan(plan: Plan, folder: str | Path) -> None:
    """Write a plan into its folder, or raise SynthesisError if it holds another one, or something else."""
    folder = Path(folder)
    check_free(folder)
    if (folder / PLAN).is_file():
        require_same(_comparable(load_plan(folder)), _comparable(plan), folder, SynthesisError)
    else:
        save_plan(plan, folder)


def check_free(folder: Path) -> None:
    """Raise SynthesisError if a folder without a plan holds something else, such as a model, which is to stay."""
    if (folder / PLAN).is_file():
        return
    strangers = [
        path.name
        for path in sorted(folder.glob("*"))
        if not path.name.startswith(".") and not any(path.match(pattern) for pattern in _BESIDES)
    ]
    if strangers:
        raise SynthesisError(f"{folder} holds {strangers[0]}, but no plan of it. Give another folder.")


def begun_threads(folder: str | Path) -> int:
    """Threads that the set in a folder was begun with; for a new one those that PyTorch uses now.

    A launcher gives each of several processes one thread, so the default of `SynthesisSettings` is another one there.
    """
    folder = Path(folder)
    return load_plan(folder).settings.threads if (folder / PLAN).is_file() else torch.get_num_threads()


def _check_rows(plan: Plan) -> None:
    """Raise ValueError unless each row is of the types and within the ranges that `Plan` says."""
    count, ends = len(plan.sources), {"reconstruction": 1, "interpolation": 2, "prior": 0}[plan.strategy]
    soft = plan.exponent is not None
    columns = {
        "sources": ((count, ends), "<i8", 0, len(plan.keys) - 1),
        "fractions": ((count,), "<f8", 0, 1),
        "labels": ((count, 2) if soft else (count,), "<i4", 0 if soft else -1, len(plan.label_sets) - 1),
    }
    for name, (shape, dtype, least, most) in columns.items():
        column = getattr(plan, name)
        if column.shape != shape or column.dtype != dtype or not count:
            raise ValueError(f"{name} are {column.shape} of {column.dtype}, not {shape} of {np.dtype(dtype)}")
        if column.size and not (least <= column.min() and column.max() <= most):  # not true of NaN either
            raise ValueError(f"{name} are not all between {least} and {most}")
    plan.keys.to_bytes().decode()
    if not all(isinstance(label, str) for labels in plan.label_sets for label in labels):
        raise ValueError("labels are not all text")
    if soft:
        check_exponent(plan.exponent)
    if not isinstance(plan.seed, int):
        raise ValueError(f"the seed is {plan.seed!r}")


def _comparable(plan: Plan) -> dict[str, Any]:
    """All of a plan in few words: what is long as a hash."""
    hashes = {"label_sets": hash_of(plan.label_sets)[:16], "sources, fractions and labels": plan.rows_digest[:16]}
    return plan.describe() | hashes
