"""What the cards of models and of synthetic sets have in common: sources, copies, citations, no private paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = [
    "cite",
    "fact_table",
    "is_hub_id",
    "listed_names",
    "needs_agreement",
    "percent",
    "privacy_facts",
    "private_traces",
    "source_table",
    "table_cell",
    "terms_notice",
    "without_folders",
]

_CITATIONS = {
    "dino_diffusion": """\
@article{jimenezperez2024dinodiffusion,
  title   = {{DiNO-Diffusion}. Scaling Medical Diffusion via Self-Supervised Pre-Training},
  author  = {Jimenez-Perez, Guillermo and Osorio, Pedro and Cersovsky, Josef and Montalt-Tordera, Javier and
             Hooge, Jens and Vogler, Steffen and Mohammadi, Sadegh},
  journal = {arXiv preprint arXiv:2407.11594},
  year    = {2024}
}
""",
    "dino": """\
@inproceedings{caron2021emerging,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J\\'egou, Herv\\'e and Mairal, Julien and
               Bojanowski, Piotr and Joulin, Armand},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021}
}
""",
    "stable_diffusion": """\
@inproceedings{rombach2022high,
  title     = {High-Resolution Image Synthesis with Latent Diffusion Models},
  author    = {Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj\\"orn},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}
""",
    "dinov2": """\
@article{oquab2024dinov2,
  title   = {{DINOv2}: Learning Robust Visual Features without Supervision},
  author  = {Oquab, Maxime and Darcet, Timoth\\'ee and Moutakanni, Th\\'eo and others},
  journal = {Transactions on Machine Learning Research},
  year    = {2024}
}
""",
    "diffseg": """\
@inproceedings{tian2024diffuse,
  title     = {Diffuse, Attend, and Segment: Unsupervised Zero-Shot Segmentation using {Stable Diffusion}},
  author    = {Tian, Junjiao and Aggarwal, Lavisha and Colaco, Andrea and Kira, Zsolt and Gonzalez-Franco, Mar},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2024}
}
""",
    "torchxrayvision": """\
@inproceedings{cohen2022torchxrayvision,
  title     = {{TorchXRayVision}: A library of chest {X}-ray datasets and models},
  author    = {Cohen, Joseph Paul and Viviano, Joseph D. and Bertin, Paul and Morrison, Paul and Torabian, Parsa and
               Guarrera, Matteo and Lungren, Matthew P. and Chaudhari, Akshay and Brooks, Rupert and
               Hashir, Mohammad and Bertrand, Hadrien},
  booktitle = {Medical Imaging with Deep Learning (MIDL)},
  year      = {2022}
}
""",
}

# A user's folder on Linux, macOS or Windows; a file URL; a DICOM UID, which has at least six numbers.
_PRIVATE = re.compile(
    r"(?<![\w.])/(?:home|Users|root)/[^\s\"'`|)]+|\b[A-Za-z]:\\+Users\\+[^\s\"'`|)]+|\bfile://[^\s\"'`|)]+|\b[012](?:\.\d+){5,}\b"
)


def cite(*works: str) -> str:
    """BibTeX of the method, and of what else was used.

    Args:
        works: Of `dino`, `dinov2`, `stable_diffusion`, `diffseg`, `torchxrayvision`; the paper of the method and those
            that it stands on, DINO and Stable Diffusion, are always there.
    """
    wanted = {"dino_diffusion", "dino", "stable_diffusion", *works}
    return "".join(entry for name, entry in _CITATIONS.items() if name in wanted)


def source_table(sources: Sequence[Mapping[str, Any]]) -> str:
    """Data sets with their licences, as a table in Markdown.

    Args:
        sources: `name` or `title` of each, and `licence`, `citation`, `url` and `contains` where known, as
            `examples/sources` finds them on record.
    """
    head = "| data set | licence | holds images of | cite |\n| --- | --- | --- | --- |"
    rows = []
    for source in sources:
        title = table_cell(_title(source))
        named = f"[{title}]({source['url']})" if source.get("url") else title
        cells = [table_cell(source.get(name) or "") for name in ("licence", "contains", "citation")]
        cells[0] = cells[0] or "not on record"
        rows.append(f"| {named} | {' | '.join(cells)} |")
    return "\n".join([head, *rows])


def needs_agreement(source: Mapping[str, Any]) -> bool:
    """Whether the licence of a data set is one that each user signs or is credentialed for."""
    return re.search(r"credentialed|restricted|agreement", source.get("licence") or "", re.IGNORECASE) is not None


def terms_notice(sources: Sequence[Mapping[str, Any]]) -> str:
    """What to heed where a source is given to those alone who have signed its terms; empty where none is."""
    signed = [f"{_title(source)} ({source['licence']})" for source in sources if needs_agreement(source)]
    if not signed:
        return ""
    return (
        f"**Credentialed data.** {'; '.join(signed)}: the provider gives these images to those alone who have agreed "
        "to its terms, and they may not be passed on. Models can hold parts of what they were trained on. Whoever "
        "uses or shares this one has to follow the terms of these sources, which may ask that derived work is shared "
        "under the same agreement."
    )


def privacy_facts(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """What was found of copies of training images, by name.

    Args:
        privacy: What `examples/eval_memorization.py` wrote, as read from its JSON.

    Raises:
        ValueError: If no synthetic images were measured, or these are no such figures.
    """
    try:
        found, real = privacy["synthetic"], privacy["held_out"]
        if found is None:
            raise ValueError(
                "The privacy figures are of no synthetic images: run eval_memorization.py with --synthetic."
            )
        return {
            "images compared with the training images": found["num_images"],
            "near-copies of training images": _share_text(found),
            "the same of real images that were not trained on": None if real is None else _share_text(real),
            "farther from their nearest training image than that is from its own (AuthPct)": percent(
                found["authentic"]
            ),
            "threshold": f"calibrated for {percent(privacy['false_alarms'])} false alarms on real images",
            "feature space": privacy["spec"]["extractor"],
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"These are no figures of eval_memorization.py: {error!r}.") from error


def private_traces(text: str) -> list[str]:
    """What in a text is of one machine or one patient: folders of users, DICOM UIDs. Empty if nothing was seen.

    It knows forms, not names: what a person has written has to be read by a person.
    """
    return sorted({match[0] for match in _PRIVATE.finditer(text)})


def percent(share: float) -> str:
    """A share in [0, 1] as `12.34 %`."""
    return f"{share:.2%}".replace("%", " %")


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
    """One name, several or none as a list; what is no id of the Hub loses its folders, also another machine's."""
    listed = [without_folders(name) for name in ([names] if isinstance(names, str) else names or ())]
    return [name if is_hub_id(name) else PureWindowsPath(name).name for name in listed]


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


def _title(source: Mapping[str, Any]) -> str:
    return str(source.get("title") or source.get("name") or "unknown")


def _share_text(figures: Mapping[str, Any]) -> str:
    interval = f"{percent(figures['low'])} to {percent(figures['high'])}"
    return f"{figures['copies']} ({percent(figures['share'])}; 95 % interval {interval})"
