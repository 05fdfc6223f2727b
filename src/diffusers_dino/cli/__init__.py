"""The command line: `diffusers-dino COMMAND`, or `python -m diffusers_dino COMMAND`.

A command is a module with a dataclass `Arguments`, whose fields are its flags, and `main(args)`; its docstring is
what `--help` shows, with one example. It is imported when it is asked for: `--help` starts at once.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

__all__ = ["COMMANDS", "Command", "main", "split_command"]


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        module: Where it is, below `diffusers_dino.cli`.
        summary: What it does, in one line.
        resumable: Whether the same command goes on with what a stopped run has done.
        shares_config: Whether its YAML file may be one of a training, with keys that it does not know.
    """

    module: str
    summary: str
    resumable: bool = False
    shares_config: bool = False

    def load(self) -> ModuleType:
        return import_module(f"{__name__}.{self.module}")


COMMANDS = {
    "shards": Command("shards", "Turn folders of images or public data sets into webdataset shards", True),
    "sources": Command("sources", "List the public data sets that `shards` knows, or describe one"),
    "cache": Command("cache", "Encode the images once, so that training runs only the UNet", True, shares_config=True),
    "synthesise": Command("synthesise", "Make a labelled set of synthetic images from real ones", True),
    "evaluate suite": Command("evaluate.suite", "All that can be asked of synthetic images, in one report", True),
    "evaluate fidelity": Command("evaluate.fidelity", "Distance of generated images from real ones", True),
    "evaluate memorization": Command("evaluate.memorization", "Copies of training images, and a gate against them"),
    "evaluate membership": Command("evaluate.membership", "Whether a model tells which images it was trained on"),
    "evaluate labels": Command("evaluate.labels", "Whether synthetic images show what their labels say", True),
    "filter": Command("filter", "List the images of a synthetic set whose labels a judge does not contradict", True),
    "evaluate augmentation": Command("evaluate.augmentation", "Classifiers with and without synthetic images", True),
    "evaluate segmentation": Command("evaluate.segmentation", "Dice of zero-shot segments on images with masks", True),
    "evaluate interpolation": Command("evaluate.interpolation", "How images change on the way between two others"),
    "extract": Command("extract", "Compute features of a set of images once, for all figures"),
    "splice": Command("splice", "Put patches of one image into the condition of another"),
    "publish": Command("publish", "Upload a trained model, or write it to a folder to carry", True),
    "demo": Command("demo", "Open a page in the browser: variations, blends and segments"),
    "convert-xrv": Command("convert_xrv", "Convert TorchXRayVision's weights to safetensors"),
}
_HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Ends the process with 2 for a wrong command line, with 1 and one line for what can be mended."""
    from . import libraries  # noqa: F401  (not for those that import this package)

    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = split_command(words)
    if name not in COMMANDS:
        _explain(words)
        return
    from .arguments import parse_arguments
    from .console import run

    command = COMMANDS[name]

    def start() -> None:
        module = command.load()
        args = parse_arguments(
            module.Arguments,
            rest,
            module.__doc__,
            prog=f"diffusers-dino {name}",
            owner_of=_owner_of,
            skip_foreign_keys=command.shares_config,
        )
        module.main(args)

    run(start, command.resumable)


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """The longest beginning that names a command, and what follows it."""
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:length]), words[length:]


def _explain(words: list[str]) -> None:
    """Print all commands, or those of a group; end with an error for a word that names none."""
    name = words[0] if words and words[0] not in _HELP else ""
    group = [each for each in COMMANDS if each.startswith(f"{name} ")] if name else list(COMMANDS)
    if not group or (name and words[1:] and words[1] not in _HELP):
        wrong = " ".join(words[:2]) if group else name
        known = group or [*COMMANDS, *{each.partition(" ")[0] for each in COMMANDS}]
        close = difflib.get_close_matches(wrong, known, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        print(f"diffusers-dino: error: there is no command {wrong!r}.{hint}", file=sys.stderr)
        print("See `diffusers-dino --help` for the commands.", file=sys.stderr)
        sys.exit(2)
    print(f"usage: diffusers-dino {name or 'COMMAND'} ... [CONFIG.yaml] [--FLAG VALUE ...]\n")
    width = max(map(len, group)) + 2
    for each in group:
        print(f"  {each:{width}}{COMMANDS[each].summary}")
    print("\n`diffusers-dino COMMAND --help` shows the flags of a command, and an example.")
    print("`cache` and `synthesise` on several GPUs: accelerate launch -m diffusers_dino COMMAND ...")
    sys.exit(0 if words else 2)


def _owner_of(flag: str) -> str | None:
    """The first command that has a flag of this name, for a config that was written for another command."""
    for name, command in COMMANDS.items():
        try:
            fields = command.load().Arguments.__dataclass_fields__
        except ImportError:  # an extra is missing
            continue
        if flag in fields:
            return f"diffusers-dino {name}"
    return None
