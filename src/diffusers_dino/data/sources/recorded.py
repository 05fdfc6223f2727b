"""What folders of images say of their own origin: the data sets they are from, and whether they show anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...files import sha256_of
from ..sharding.writing import MANIFEST, ShardError, read_manifest, verify_shards
from ..stores.remote import is_remote
from .catalogue import find_source
from .description import Source
from .lineage import lineage

__all__ = ["PHANTOM_MANIFEST", "describe_source", "recorded_sources", "require_synthetic"]

PHANTOM_MANIFEST = "phantom-cxr.json"  # of examples/make_phantoms.py

_PHANTOMS = {
    "name": "phantom_cxr",
    "title": "Phantom chest radiographs of diffusers-dino",
    "licence": "CC BY 3.0, as the CT scan that they are rendered from (LIDC-IDRI-0001)",
    "citation": "Armato et al., Data From LIDC-IDRI, The Cancer Imaging Archive, 2015",
    "url": "https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX",
    "contains": [],
}


def describe_source(source: Source | str) -> dict[str, Any]:
    """What manifests and cards say of a data set: name, title, licence, citation, url, contains.

    Args:
        source: A description, a name of the catalogue or a YAML file (see `find_source`); the bundled phantoms are
            `"phantom_cxr"`.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If the YAML file is not there.
    """
    if source == _PHANTOMS["name"]:
        return dict(_PHANTOMS)
    source = source if isinstance(source, Source) else find_source(source)
    return {
        "name": source.name,
        "title": source.title,
        "licence": source.licence,
        "citation": source.citation,
        "url": source.url,
        "contains": sorted(lineage(source) - {source.name}),
    }


def recorded_sources(data_dir: str | Path) -> list[dict[str, Any]]:
    """The data sets that a folder of shards says its images are from; empty where nothing is on record.

    Args:
        data_dir: A folder, or tars in it by name or pattern. Remote ones are not looked up.

    Returns:
        As `examples/make_shards.py` writes them into the manifest: name, title, licence, citation, url, contains.
    """
    folder = _folder_of(data_dir)
    if folder is None:
        return []
    if (folder / PHANTOM_MANIFEST).is_file():
        return [describe_source("phantom_cxr")]
    try:
        found = _lineage_of(folder)
    except (FileNotFoundError, ShardError):
        return []
    if found.get("kind") == "synthetic":
        return [{"title": f"a synthetic set (plan {found['plan'][:16]})"}]
    sources = found.get("sources", [])
    return [dict(source) for source in sources if source.get("samples", 1)] if isinstance(sources, list) else []


def require_synthetic(data_dir: str | Path) -> None:
    """Refuse images that are not those of a synthetic set or phantoms, byte for byte as their manifest says.

    It guards against the wrong folder, not against a manifest that was written to deceive.

    Args:
        data_dir: A folder of shards, or tars in it by name or pattern.

    Raises:
        ValueError: If the folder does not say that its images are synthetic, or holds other shards than it says.
    """
    folder = _folder_of(data_dir)
    if folder is None:
        raise ValueError(f"{data_dir} is remote: whether its images are synthetic can be verified in a folder alone.")
    if (folder / PHANTOM_MANIFEST).is_file():
        problems = _wrong_phantoms(folder)
    else:
        try:
            kind = _lineage_of(folder).get("kind")
        except (FileNotFoundError, ShardError):
            kind = None
        if kind != "synthetic":
            raise ValueError(
                f"{folder.name}: nothing says that these images are synthetic. What is shown in public has to come "
                f"from phantoms ({PHANTOM_MANIFEST}) or from generate_dataset.py ({MANIFEST}), with its manifest."
            )
        problems = verify_shards(folder)
    if problems:
        raise ValueError(f"{folder.name} is not what its manifest says: {'; '.join(problems)}.")


def _folder_of(data_dir: str | Path) -> Path | None:
    if is_remote(str(data_dir)):
        return None
    path = Path(data_dir)
    return path.parent if path.suffix == ".tar" else path


def _lineage_of(folder: Path) -> dict[str, Any]:
    found = read_manifest(folder).get("lineage") or {}
    return found if isinstance(found, dict) else {}


def _wrong_phantoms(folder: Path) -> list[str]:
    try:
        entries = {
            entry["file"]: entry["sha256"] for entry in json.loads((folder / PHANTOM_MANIFEST).read_text())["shards"]
        }
    except (ValueError, KeyError, TypeError):
        return [f"{PHANTOM_MANIFEST} is damaged"]
    present = {path.name: path for path in folder.glob("*.tar")}
    strangers = [f"{name} is not in the manifest" for name in sorted(set(present) - set(entries))]
    changed = [name for name, path in sorted(present.items()) if name in entries and sha256_of(path) != entries[name]]
    return strangers + [f"{name} has changed: its SHA-256 is another one" for name in changed]
