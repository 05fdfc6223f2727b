"""The output folder of a training: one process at a time, one run, and nothing of another run in it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..files import beside, lock_folder, make_writable_folder, read_json, recover_folder, remove_partials, write_json
from .checkpoints import Checkpoint, find_checkpoint, newest_checkpoint, set_aside_later

__all__ = ["RunFolder", "RunFolderError", "put_result"]

logger = logging.getLogger(__name__)

ARGUMENTS, LOG = "training_arguments.json", "train_log.jsonl"
_RUN = "run.json"
# What makes a folder a model that loads: goes first, comes last.
_INDICES = ("model_index.json", "config.json")
_CARD = ("README.md", "training_record.json")
_WEIGHTS = (
    "unet",
    "transformer",
    "fusion",
    "prior",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "best",
)
_FROZEN = ("vae", "conditioner", "scheduler", "text_encoder", "tokenizer")
_FURTHER = ("validation", "logs", "set-aside", "reconstructions.png", LOG, ARGUMENTS)
_FURTHER += ("diagnosis.json", "explained_variance.json", "validation.json")


class RunFolderError(ValueError):
    """A folder holds another run, or another process is at work in it. The message says how to go on."""


class RunFolder:
    """Holds an output folder for one run, from when it is made until `close`; only the main process makes one.

    A run has an identity, which `run.json` and the manifest of each checkpoint note. Nothing of another run is changed
    before `begin`.

    Args:
        path: The folder.
        resume: `"latest"`, a checkpoint as in `checkpoints.find_checkpoint`, or None for a new run.
        overwrite: Whether a new run may replace what another one left.
        inputs: Files and folders that the run reads, and that must not be replaced.

    Attributes:
        run: The run's identity.
        checkpoint: From where `claim` says to go on; None for a new run.

    Raises:
        RunFolderError: If another process holds it.
    """

    def __init__(
        self, path: str | Path, resume: str | None = None, overwrite: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        self.path, self.resume, self.overwrite, self.inputs = make_writable_folder(path), resume, overwrite, inputs
        self.run = uuid.uuid4().hex
        self.checkpoint: Checkpoint | None = None
        self._held = ExitStack()
        self._held.enter_context(lock_folder(self.path, RunFolderError))

    def close(self) -> None:
        """Let other runs into the folder."""
        self._held.close()

    def claim(self) -> Checkpoint | None:
        """Find what to go on from; RunFolderError if the folder holds another run, and nobody said what to do.

        What a kill left half-done is finished or removed first.
        """
        for path in sorted(self.path.glob(".*.*")):
            if found := re.fullmatch(r"\.(.+)\.(old|partial)", path.name):
                recover_folder(self.path / found[1])
            elif path.name.endswith(".deleted"):
                shutil.rmtree(path, ignore_errors=True)
        remove_partials(self.path)
        known = self._known_run()
        if self.resume:
            self.checkpoint = newest_checkpoint(self.path, known) if self.resume == "latest" else self._named(known)
        if self._goes_on_here():
            self.run = known or self.checkpoint.info.get("run") or self.run
            return self.checkpoint
        held = self._held_by_another(known)
        if held and not self.overwrite:
            hint = "go on with that run by --resume_from_checkpoint=latest, " if not self.resume else ""
            raise RunFolderError(
                f"{self.path} holds another run or files of such names ({', '.join(held[:4])}): {hint}replace it by "
                "--overwrite_output_dir, or give another --output_dir."
            )
        self._require_inputs_outside()
        return self.checkpoint

    def begin(self) -> None:
        """Make the folder this run's: note its identity, and take away what another run left."""
        if not self._goes_on_here():
            for name in (*_INDICES, *_CARD):
                (self.path / name).unlink(missing_ok=True)
        write_json(self.path / _RUN, {"run": self.run})  # from here on checkpoints of another run are foreign
        if not self._goes_on_here():
            for path in [self.path / name for name in (*_WEIGHTS, *_FROZEN, *_FURTHER)] + self._checkpoints():
                _delete(path)

    def note(self, arguments: dict[str, Any]) -> None:
        """Note the arguments of the run, once it goes on.

        From an older checkpoint, later ones are set aside, and so are better weights of later updates.
        """
        if self._goes_on_here():
            self._set_aside(self.checkpoint.step)
        write_json(self.path / ARGUMENTS, arguments)

    def _goes_on_here(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.path.resolve().parent == self.path.resolve()

    def _known_run(self) -> str | None:
        try:
            run = read_json(self.path / _RUN)["run"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as damage:
            logger.warning("%s is damaged (%s): its checkpoints tell whose they are.", self.path / _RUN, damage)
            return None
        return run if isinstance(run, str) else None

    def _named(self, known: str | None) -> Checkpoint:
        checkpoint = find_checkpoint(self.path, self.resume)
        theirs = checkpoint.info.get("run")
        if known and theirs not in (None, known) and checkpoint.path.resolve().parent == self.path.resolve():
            raise RunFolderError(
                f"{checkpoint.path} is of another run than the others in its folder. Move it elsewhere, and resume "
                "from there into a new --output_dir."
            )
        return checkpoint

    def _held_by_another(self, known: str | None) -> list[str]:
        """What the folder holds that would be lost: of a run that has trained, or of which nobody knows."""
        names = [name for name in (*_INDICES, *_WEIGHTS) if (self.path / name).exists()]
        names += [path.name for path in self._checkpoints()]
        log = self.path / LOG
        if log.is_file() and log.stat().st_size and self.resume != "latest":
            names.append(LOG)
        if known is None:  # without our own run, they are somebody's
            others = (*_FROZEN, *_CARD, *_FURTHER, "plan.json")
            names += [name for name in others if name not in (LOG, ARGUMENTS) and (self.path / name).exists()]
        if self.resume == "latest" and known and set(names) == {"best"}:
            return []  # this run itself, killed before its first checkpoint
        return names

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self.path.glob("checkpoint-*") if path.is_dir())

    def _require_inputs_outside(self) -> None:
        """What the run reads must not be what it replaces."""
        doomed = {(self.path / name).resolve() for name in (*_INDICES, *_WEIGHTS, *_FROZEN, *_FURTHER)}
        doomed |= {path.resolve() for path in self._checkpoints()}
        own = self.path.resolve()
        doomed = {path for path in doomed if path.exists()}
        for given in (*self.inputs, *([self.checkpoint.path] if self.checkpoint else [])):
            place = given.resolve()
            if doomed and (place == own or not doomed.isdisjoint((place, *place.parents))):
                raise RunFolderError(f"This run reads {given}, and would replace it: give another --output_dir.")

    def _set_aside(self, step: int) -> None:
        moved = set_aside_later(self.path, step)
        if self.resume != "latest":
            best = self.path / "best"
            try:
                later = read_json(best / "metric.json")["step"] > step
            except (OSError, ValueError, KeyError, TypeError):
                later = False
            if later:
                place = self.path / "set-aside" / "best"
                shutil.rmtree(place, ignore_errors=True)
                place.parent.mkdir(exist_ok=True)
                best.rename(place)
                moved.append(best)
        if moved:
            names = ", ".join(path.name for path in moved)
            logger.warning("%s: of later updates than this run goes on from; moved to set-aside/.", names)


def put_result(folder: Path, write: Callable[[Path], None]) -> None:
    """Put the files of a finished model, which `write` writes aside, into a folder that loads only once all are there.

    An index (`model_index.json`, `config.json`) and a card that are there go first; the index comes last.
    """
    aside = beside(folder / "result", "partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for name in (*_INDICES, *_CARD):
        (folder / name).unlink(missing_ok=True)
    written = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    for path in sorted(written, key=lambda path: path.parent == aside and path.name in _INDICES):
        target = folder / path.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(aside)


def _delete(path: Path) -> None:
    """Delete a file or folder; a folder that is half deleted must not look like one."""
    if path.is_dir() and not path.is_symlink():
        doomed = beside(path, "deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
