"""List the public data sets that `diffusers-dino shards` knows, or describe one.

    diffusers-dino sources --name nih_chest_xray14

A description of your own is a YAML file; docs/sources.md says what stands in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.sources import find_source, source_names
from .arguments import flag


@dataclass
class Arguments:
    name: str | None = flag(None, "A data set of the catalogue, or a YAML file; by default all are listed.")


def main(args: Arguments) -> None:
    for name in source_names() if args.name is None else [args.name]:
        source = find_source(name)
        print(f"{source.name:24}{source.title}" if args.name is None else source)
