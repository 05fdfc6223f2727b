"""Where the images of a folder of shards come from: what its manifest says, written and read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...files import read_json, sha256_of
from ..sources import PHANTOMS, Source, describe_source, overlaps
from ..stores.remote import is_remote
from .manifest import MANIFEST, ShardError, few, read_manifest, verify_shards
from .parts import Sample, Unreadable
from .plan import ShardPlan

__all__ = ["PHANTOM_MANIFEST", "describe_lineage", "lineage_of", "recorded_sources", "require_synthetic"]

PHANTOM_MANIFEST = "phantom-cxr.json"  # beside the bundled phantoms


def describe_lineage(
    sources: Sequence[Source], plan: ShardPlan, samples: Sequence[Sample], unreadable: Sequence[Unreadable]
) -> dict[str, Any]:
    """Where the images come from, for the manifest."""
    written = Counter(samples[number].source for shard in plan.shards for number in shard.samples)
    readable, refused = (Counter(one.source for one in several) for several in (samples, unreadable))
    described = [
        {
            **describe_source(source),
            "images": readable[source.name] + refused[source.name],
            "unreadable": refused[source.name],
            "copies_left_out": readable[source.name] - written[source.name],
            "samples": written[source.name],
        }
        for source in sources
    ]
    return {
        "sources": described,
        "overlaps": [str(overlap) for overlap in overlaps(sources)],
        "duplicates": [list(row) for row in plan.duplicates],
        "largest_group": plan.largest_group,
        "version": version("diffusers-dino"),
    }


def recorded_sources(data_dir: str | Path) -> list[dict[str, Any]]:
    """What `describe_source` said of each data set in a folder of shards, or of tars in it; empty if it is unknown.

    Remote folders are not looked up.
    """
    folder = _folder_of(data_dir)
    if folder is None:
        return []
    if (folder / PHANTOM_MANIFEST).is_file():
        return [describe_source(PHANTOMS)]
    found = lineage_of(folder)
    if found.get("kind") == "synthetic":
        return [{"title": f"a synthetic set (plan {found['plan'][:16]})"}]
    sources = found.get("sources", [])
    return [dict(source) for source in sources if source.get("samples", 1)] if isinstance(sources, list) else []


def require_synthetic(data_dir: str | Path) -> None:
    """Refuse images, with `ValueError`, unless they are synthetic or phantoms, byte for byte as their manifest says.

    This guards against the wrong folder, not against a forged manifest. `data_dir` is a folder of shards, or tars in
    it by name or pattern.
    """
    folder = _folder_of(data_dir)
    if folder is None:
        raise ValueError(f"{data_dir} is remote. Only a local folder can be checked for synthetic images.")
    if (folder / PHANTOM_MANIFEST).is_file():
        problems = _wrong_phantoms(folder)
    else:
        if lineage_of(folder).get("kind") != "synthetic":
            raise ValueError(
                f"{folder.name}: nothing says that these images are synthetic. Images shown in public must be "
                f"phantoms (with {PHANTOM_MANIFEST}) or a synthetic set (with its {MANIFEST})."
            )
        problems = verify_shards(folder)
    if problems:
        raise ValueError(f"{folder.name} is not what its manifest says: {few(problems)}.")


def _folder_of(data_dir: str | Path) -> Path | None:
    if is_remote(str(data_dir)):
        return None
    path = Path(data_dir)
    return path.parent if path.suffix == ".tar" else path


def lineage_of(folder: Path) -> dict[str, Any]:
    """What a manifest says of the origin of the images; nothing if there is no sound manifest."""
    try:
        found = read_manifest(folder).get("lineage")
    except (FileNotFoundError, ShardError):
        return {}
    return found if isinstance(found, dict) else {}


def _wrong_phantoms(folder: Path) -> list[str]:
    try:
        shards = read_json(folder / PHANTOM_MANIFEST)["shards"]
        entries = {entry["file"]: entry["sha256"] for entry in shards}
    except (ValueError, KeyError, TypeError):
        return [f"{PHANTOM_MANIFEST} is damaged"]
    present = {path.name: path for path in folder.glob("*.tar")}
    strangers = [f"{name} is not in the manifest" for name in sorted(set(present) - set(entries))]
    changed = [name for name, path in sorted(present.items()) if name in entries and sha256_of(path) != entries[name]]
    return strangers + [f"{name} has changed: its SHA-256 differs" for name in changed]
