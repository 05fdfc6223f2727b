"""A plan on disk: `plan.json` for people, `plan.safetensors` for its rows, and the digest that holds both together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..data.stores.archives import PackedKeys
from ..files import atomic_write, write_json
from .plan import Plan
from .settings import SynthesisError, SynthesisSettings

__all__ = ["PLAN", "freeze_plan", "load_plan", "save_plan"]

PLAN = "plan.json"
_ROWS = "plan.safetensors"
_FORMAT = 1
_ANOTHER = "Go on as it was begun, or give another output folder."


def save_plan(plan: Plan, folder: str | Path) -> None:
    """Write a plan; the same plan gives the same bytes. `plan.json` comes last: without it there is no plan."""
    folder = Path(folder)
    with atomic_write(folder / _ROWS) as file:
        file.write(save(plan.columns()))
    write_json(folder / PLAN, {"format": _FORMAT, "digest": plan.digest, **plan.describe()})


def load_plan(folder: str | Path) -> Plan:
    """Read what `save_plan` wrote.

    Raises:
        FileNotFoundError: If there is no plan.
        SynthesisError: If it was changed since, is damaged, or of another format.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / PLAN).read_bytes())
        rows = load_file(folder / _ROWS)
        if content["format"] != _FORMAT:
            raise SynthesisError(f"{folder / PLAN} is of format {content['format']}, this version reads {_FORMAT}.")
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
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no plan in {folder}: {error.filename or error} is missing.") from error
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, SynthesisError):
            raise
        raise SynthesisError(f"The plan in {folder} is damaged: {error!r}. Restore it, or begin anew.") from error
    if plan.digest != content["digest"]:
        raise SynthesisError(
            f"The plan in {folder} was changed after it was frozen: it no longer has its digest "
            f"{content['digest'][:16]}. Restore {PLAN} and {_ROWS}; for another plan give another output folder."
        )
    return plan


def freeze_plan(plan: Plan, folder: str | Path) -> None:
    """Write a plan into its folder, or check that the folder holds this very plan.

    Raises:
        SynthesisError: If the folder holds another plan, a plan that was changed, or other shards.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        strangers = sorted(path.name for path in folder.glob("*.tar"))
        if strangers:
            raise SynthesisError(f"{folder} holds {strangers[0]} and no plan that it is of. Give another folder.")
        save_plan(plan, folder)
        return
    frozen = load_plan(folder)
    if frozen.digest != plan.digest:
        lines = differences(frozen.describe(), plan.describe()) or ["the rows: other sources, labels or fractions"]
        raise SynthesisError("\n- ".join([f"{folder} is of another plan:", *lines]) + f"\n{_ANOTHER}")


def differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each entry in which two nested dictionaries differ."""
    lines = []
    for name in {**theirs, **ours}:
        there, here = theirs.get(name), ours.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{name}: ")
        elif there != here and name == "label_sets":
            lines.append(f"{prefix}labels: other combinations there than here")
        elif there != here:
            lines.append(f"{prefix}{name}: {there} there, {here} here")
    return lines
