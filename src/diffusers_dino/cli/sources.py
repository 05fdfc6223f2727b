"""List the public data sets that `diffusers-dino shards` knows, or describe one.

    diffusers-dino sources --name nih_chest_xray14

A YAML file describes a data set of your own: docs/sources.md says how.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.sources import find_source, layout_facts, source_names
from .arguments import flag


@dataclass
class Arguments:
    name: str | None = flag(None, "A data set of the catalogue, or a YAML file; by default all are listed.")


def main(args: Arguments) -> None:
    if args.name is None:
        for source in map(find_source, source_names()):
            images = f"{source.images:,}" if source.images else "?"
            print(f"{source.name:22}{images:>9}  {source.title}")
        return
    source = find_source(args.name)
    images = f"{source.images:,} images" if source.images else "number of images unknown"
    print(f"{source.name}: {source.title or 'no title'}, {images}\n{source.url}".rstrip())
    for name, text in layout_facts(source).items():
        print(f"{name}: {text}")
