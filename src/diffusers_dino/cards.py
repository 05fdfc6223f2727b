"""What the cards of models and of synthetic sets have in common: tables of facts without private paths, citations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = ["CITATION", "fact_table", "is_hub_id", "listed_names", "table_cell", "without_folders"]

CITATION = """\
@article{jimenezperez2024dinodiffusion,
  title   = {{DiNO-Diffusion}. Scaling Medical Diffusion via Self-Supervised Pre-Training},
  author  = {Jimenez-Perez, Guillermo and Osorio, Pedro and Cersovsky, Josef and Montalt-Tordera, Javier and
             Hooge, Jens and Vogler, Steffen and Mohammadi, Sadegh},
  journal = {arXiv preprint arXiv:2407.11594},
  year    = {2024}
}
@inproceedings{caron2021emerging,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J\\'egou, Herv\\'e and Mairal, Julien and
               Bojanowski, Piotr and Joulin, Armand},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021}
}
@inproceedings{rombach2022high,
  title     = {High-Resolution Image Synthesis with Latent Diffusion Models},
  author    = {Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj\\"orn},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}
"""


def fact_table(facts: Mapping[str, Any]) -> str:
    """Facts by name as a table in Markdown; those without a value are left out."""
    known = {name: value for name, value in facts.items() if value not in (None, [], "")}
    rows = [f"| {table_cell(name)} | {table_cell(value)} |" for name, value in known.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows]) if rows else "Nothing is on record."


def table_cell(value: Any) -> str:
    """A value, or the values of a list, on one line of a table; local paths lose their folders."""
    if isinstance(value, (list, tuple)):
        text = ", ".join(str(without_folders(item)) for item in value)
    else:
        text = str(without_folders(value))
    return " ".join(text.split()).replace("|", "\\|")


def listed_names(names: str | Iterable[str] | None) -> list[str]:
    """One name, several or none as a list; local paths lose their folders."""
    listed = [names] if isinstance(names, str) else list(names or ())
    return [without_folders(name) for name in listed]


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's: `org/name`, and no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def without_folders(value: Any) -> Any:
    """A local path reduced to its last part, as folder names can tell more than is meant; anything else as it is."""
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    windows = PureWindowsPath(text)
    local = isinstance(value, Path) or os.path.isabs(text) or windows.drive or text.startswith(("~", ".", "file:"))
    if not local and not (len(text) < 1024 and os.path.exists(text)):
        return value
    return windows.name or text
