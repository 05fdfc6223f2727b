"""Checkpoints that are whole or not there at all.

A checkpoint is written under another name, forced to disk, described by a manifest (size and SHA-256 of each file) and
only then renamed to `checkpoint-STEP`; older ones are deleted afterwards. Whoever resumes looks for manifests, so a
run that was killed at any moment, also while it saved, continues from the last complete state.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..files import beside, read_json, save_atomically, sha256_of
from ..frozen import require_same
from .plain_state import random_states, read_state, set_random_states, write_state

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "Resumable",
    "complete_checkpoints",
    "delete_old_checkpoints",
    "describe_file",
    "find_checkpoint",
    "load_run",
    "newest_checkpoint",
    "read_checkpoint",
    "read_pickle",
    "require_same_run",
    "save_run",
    "saying_what_is_full",
    "set_aside_later",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Format 1 held optimizer and random states as pickles.
_FORMAT = 2
_SET_ASIDE = "set-aside"
# Kinds of files that are read, and so must be those that were written.
_READ = {".safetensors", ".json", ".bin", ".pkl", ".pt", ".pth"}


class CheckpointError(ValueError):
    """A checkpoint is not complete, of another run, or cannot be written. The message names it and what is wrong."""


class Resumable(Protocol):
    """What writes its state into the folder of a checkpoint, and reads it again."""

    def save(self, folder: Path) -> None:
        """Write the state, in the main process."""

    def load(self, folder: Path) -> None:
        """Take the state up, in every process."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, its number of updates, and what was noted, such as the data position."""

    path: Path
    step: int
    info: dict[str, Any]


def save_run(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    state: Resumable,
    *,
    info: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write `checkpoint-STEP` with the state of a run; every process must call this.

    Args:
        accelerator: Tells the processes apart, and has the scaler of mixed precision.
        output_dir: Folder of the run.
        step: Number of updates so far.
        state: What writes models, optimizer and schedule.
        info: What to note in the manifest, such as `position`; JSON can hold it.
        keep: How many checkpoints to keep; None keeps all.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If it cannot be written, for example because the disk is full. Older ones are untouched.
    """
    is_main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    written = Path(output_dir) / f"checkpoint-{step}"
    atomic = save_atomically(written) if is_main else nullcontext(beside(written, "partial"))
    with saying_what_is_full(written), atomic as folder:
        wait()
        if is_main:
            state.save(folder)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        write_state(_process_file(folder, accelerator.process_index), {"random": random_states(), "scaler": scaler})
        wait()
        if is_main:
            _write_manifest(folder, step, info)
    wait()
    if is_main:
        delete_old_checkpoints(output_dir, math.inf if keep is None else keep, written)
    return written


def _write_manifest(folder: Path, step: int, info: dict[str, Any]) -> None:
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): describe_file(path) for path in written}
    manifest = {"format": _FORMAT, "step": step, "info": info, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


@contextmanager
def saying_what_is_full(written: Path) -> Iterator[None]:
    """CheckpointError, with what to do, for what Python, PyTorch and safetensors say of a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(written.parent).free / 2**30
        raise CheckpointError(
            f"{written.name} could not be written to {written.parent} ({free:.1f} GiB free): {error}. The checkpoints "
            "before it are untouched: make room, and resume from the latest."
        ) from error


def load_run(accelerator: Accelerator, checkpoint: Checkpoint, state: Resumable) -> None:
    """Load a checkpoint into `state`; every process must call this.

    No code of a checkpoint is run: it is read as safetensors, and older pickles only as far as they are tensors,
    numbers and texts.
    """
    _refuse_objects(checkpoint.path)
    try:
        state.load(checkpoint.path)
        own = _process_file(checkpoint.path, accelerator.process_index)
        first = _process_file(checkpoint.path, 0)
        if own.is_file():
            set_random_states(read_state(own)["random"])
        scaler = read_state(first)["scaler"] if first.is_file() else read_pickle(checkpoint.path / "scaler.pt", {})
        if scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(scaler)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error


def require_same_run(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """CheckpointError that names each difference, unless a checkpoint noted what is expected, or did not note it."""
    noted = {name: value for name, value in expected.items() if name in checkpoint.info}
    require_same({name: checkpoint.info[name] for name in noted}, noted, checkpoint.path, CheckpointError)


def read_pickle(path: Path, default: Any = None) -> Any:
    """A file of an older checkpoint, if it is tensors, numbers and texts; `default` if it is not there."""
    if not path.is_file():
        return default
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(_runs_code(path)) from error


def _refuse_objects(checkpoint: Path) -> None:
    """Refuse a checkpoint with a pickle that names objects, whether or not it would be read."""
    allowed = {"numpy.dtype", "numpy.ndarray", "numpy.dtypes.UInt32DType", "_codecs.encode"}  # of NumPy's generator
    for path in sorted(path for pattern in ("*.pkl", "*.bin", "*.pt", "*.pth") for path in checkpoint.glob(pattern)):
        if path.name.startswith("random_states"):  # never loaded: only dropout would depend on them
            try:
                named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except (RuntimeError, ValueError, UnpicklingError) as error:
                raise CheckpointError(_runs_code(path)) from error
            if {name for name in named if not name.endswith("multiarray._reconstruct")} - allowed:
                raise CheckpointError(_runs_code(path))
        else:
            read_pickle(path)


def _runs_code(path: Path) -> str:
    return (
        f"{path} holds more than tensors, numbers and texts, and could run code. Resume from a checkpoint that this "
        "package wrote."
    )


def _process_file(folder: Path, process: int) -> Path:
    return folder / f"random_states_{process}.safetensors"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: If it has no manifest, or a file is missing, cut short or changed.
    """
    path = Path(path)
    try:
        manifest = read_json(path / MANIFEST, error=CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}") from error
    except OSError as error:
        raise CheckpointError(f"The {MANIFEST} of {path} cannot be read: {error}") from error
    if problem := _problem_of(manifest, path.name):
        raise CheckpointError(f"The {MANIFEST} of {path} is damaged: {problem}")
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} lacks {name}, which its manifest lists")
        if describe_file(path / name) != expected:
            raise CheckpointError(f"{path / name} is not the file that the manifest describes")
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.suffix in _READ and name not in manifest["files"] and name != MANIFEST:
            raise CheckpointError(f"{path} holds {name}, which its manifest does not list")
    return Checkpoint(path, manifest["step"], manifest["info"])


def _problem_of(manifest: Any, folder: str) -> str | None:
    """What is wrong with the types and ranges of a manifest, or None."""
    if not isinstance(manifest, dict) or not {"step", "files", "info"} <= manifest.keys():
        return "it lacks step, files or info"
    step, files, info = manifest["step"], manifest["files"], manifest["info"]
    if manifest.get("format", 1) not in range(1, _FORMAT + 1):
        return f"format {manifest['format']!r} is not known to this version"
    if not isinstance(info, dict) or not isinstance(files, dict):
        return "files and info must be objects"
    if not _is_count(step) or (_is_checkpoint(folder) and folder != f"checkpoint-{step}"):
        return f"step is {step!r}"
    if not _is_count(info.get("position", 0)):
        return f"position is {info['position']!r}"
    for name, facts in files.items():
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or "\\" in name or name != plain.as_posix():
            return f"{name!r} is not the name of a file in it"
        if not isinstance(facts, dict) or not _is_count(facts.get("size")) or not isinstance(facts.get("sha256"), str):
            return f"{name} is described by {facts!r}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def find_checkpoint(output_dir: str | Path, name: str) -> Checkpoint:
    """The checkpoint of this name in `output_dir`, or at this path.

    Raises:
        CheckpointError: If it is not there, or not complete.
    """
    inside = Path(output_dir) / name
    if not inside.is_dir() and not Path(name).is_dir():
        there = ", ".join(path.name for path in _checkpoint_folders(output_dir)) or "none"
        raise CheckpointError(f"There is no checkpoint {name}, neither in {output_dir} nor here. There: {there}.")
    return read_checkpoint(inside if inside.is_dir() else name)


def newest_checkpoint(output_dir: str | Path, run: str | None = None) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or of any; None if there is none.

    Incomplete ones and those of other runs are named in a warning. Those that note no run, as older ones, belong to
    each.
    """
    for checkpoint in _readable(reversed(_checkpoint_folders(output_dir))):
        if run is None or checkpoint.info.get("run") in (None, run):
            return checkpoint
        logger.warning("Skipped a checkpoint: %s is of another run.", checkpoint.path)
    return None


def complete_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, by their number of updates; incomplete ones are named in a warning.

    CheckpointError if there is none.
    """
    found = list(_readable(_checkpoint_folders(output_dir)))
    if not found:
        raise CheckpointError(
            f"There is no complete checkpoint-STEP in {output_dir}. Let the training write some, and keep all of them."
        )
    return found


def delete_old_checkpoints(output_dir: str | Path, keep: float, written: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (at least 1), and what killed runs left half-written.

    The one just `written` is always kept.
    """
    if keep < 1:
        raise ValueError(f"At least one checkpoint must be kept, got {keep}.")
    others = [path for path in _checkpoint_folders(output_dir) if path != written]
    too_many = len(others) + (written is not None) - keep
    for path in others[: int(max(0, too_many))]:
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        path.rename(beside(path, "deleted"))
    for leftover in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def set_aside_later(output_dir: str | Path, step: int) -> list[Path]:
    """Move the checkpoints after an update, from where a run now goes on another way, to the folder `set-aside`."""
    later = [path for path in _checkpoint_folders(output_dir) if _step_of(path) > step]
    for path in later:
        place = Path(output_dir) / _SET_ASIDE / path.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
    return later


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _readable(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    """The complete ones; a warning names the others."""
    for path in paths:
        try:
            yield read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Skipped a checkpoint: %s", error)


def _checkpoint_folders(output_dir: str | Path) -> list[Path]:
    return sorted(filter(lambda path: _is_checkpoint(path.name), Path(output_dir).glob("checkpoint-*")), key=_step_of)


def _is_checkpoint(name: str) -> bool:
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
