"""Checkpoints that are whole or not there at all.

A checkpoint is written under another name, forced to disk, described by a manifest (size and SHA-256 of each file) and
only then renamed to `checkpoint-STEP`; older ones are deleted afterwards. Whoever resumes looks for manifests, so a
run that was killed at any moment, also while it saved, continues from the last complete state.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from safetensors import SafetensorError

from ..data import Preprocessing
from ..files import beside, save_atomically, sha256_of
from ..frozen import require_same

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "complete_checkpoints",
    "delete_old_checkpoints",
    "describe_file",
    "describe_run",
    "find_checkpoint",
    "read_checkpoint",
    "resume_run",
    "save_run",
    "saving_checkpoint",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is not complete, of another run, or cannot be written. The message names it and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, its number of updates, and what was noted, such as the data position."""

    path: Path
    step: int
    info: dict[str, Any]


def save_run(
    accelerator: Accelerator, output_dir: str | Path, step: int, *, info: dict[str, Any], keep: int | None = None
) -> None:
    """Write `checkpoint-STEP` with all that accelerate knows of a run; every process must call this.

    Args:
        accelerator: Has prepared the model and the optimizer, and registered what else belongs to the run.
        output_dir: Folder of the run.
        step: Number of updates so far.
        info: What to note in the manifest: `position`, and what `describe_run` says.
        keep: How many checkpoints to keep; None keeps all.

    Raises:
        CheckpointError: If it cannot be written, for example because the disk is full. Older ones are untouched.
    """
    is_main = accelerator.is_main_process
    try:
        with saving_checkpoint(output_dir, step, info, is_main, accelerator.wait_for_everyone) as folder:
            accelerator.save_state(str(folder))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, said by Python, PyTorch and safetensors
        free = shutil.disk_usage(output_dir).free / 2**30
        raise CheckpointError(
            f"checkpoint-{step} could not be written to {output_dir} ({free:.1f} GiB free): {error}. The checkpoints "
            "before it are untouched: make room, and resume from the latest."
        ) from error
    if is_main and keep is not None:
        delete_old_checkpoints(output_dir, keep)
    elif is_main:
        _delete_leftovers(output_dir)


def describe_run(seed: int, preprocessing: Preprocessing, shuffle_window_shards: int) -> dict[str, Any]:
    """What decides which pixels are shown when: a run goes on only from a checkpoint that noted the same."""
    window = shuffle_window_shards or None
    return {"seed": seed, "preprocessing": preprocessing.fingerprint(), "shuffle_window_shards": window}


def resume_run(
    accelerator: Accelerator, output_dir: str | Path, name: str, expected: dict[str, Any]
) -> Checkpoint | None:
    """Load a checkpoint that `save_run` wrote, named as in `find_checkpoint`; every process must call this.

    It must have noted what is `expected`, from `describe_run`.

    Returns:
        The checkpoint that was loaded; None if there is none.

    Raises:
        CheckpointError: If the one asked for is incomplete, belongs to another kind of run, or holds objects.
    """
    found: list[Checkpoint | None] = [None]
    if accelerator.is_main_process:  # the hashes need not be checked by every process
        found = [find_checkpoint(output_dir, name)]
    checkpoint = broadcast_object_list(found)[0]
    if checkpoint is not None:
        begun = {name: checkpoint.info.get(name) for name in expected}
        require_same(begun, expected, checkpoint.path, CheckpointError)
        _load_plain(accelerator, checkpoint.path)
    return checkpoint


def _load_plain(accelerator: Accelerator, checkpoint: Path) -> None:
    """Let accelerate load a checkpoint, if all of it is tensors, numbers and texts: objects could run code.

    Pickles are first read by accelerate's own limited reader, as it unpickles the states of registered objects
    (`custom_checkpoint_N.pkl`) without a limit, and goes on without random states that it cannot read.
    """
    try:
        for path in checkpoint.glob("*.pkl"):
            load(path, map_location="cpu")
        accelerator.load_state(str(checkpoint))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{checkpoint} holds more than tensors, numbers and texts, and could run code. Resume from a checkpoint "
            "that this package wrote."
        ) from error


@contextmanager
def saving_checkpoint(
    output_dir: str | Path,
    step: int,
    info: dict[str, Any] | None = None,
    is_main_process: bool = True,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Save a checkpoint: `with saving_checkpoint(out, 500) as folder: accelerator.save_state(folder)`.

    Every process must enter, and all must see the same folder. The main process writes the manifest, with `info`,
    which JSON can hold. `wait_for_everyone` is a barrier between the processes.

    Yields:
        The folder to write into. If the body raises, no checkpoint appears.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    with save_atomically(final) if is_main_process else nullcontext(beside(final, "partial")) as partial:
        wait_for_everyone()
        yield partial
        wait_for_everyone()
        if is_main_process:
            written = sorted(path for path in partial.rglob("*") if path.is_file())
            files = {path.relative_to(partial).as_posix(): describe_file(path) for path in written}
            manifest = {"format": _FORMAT, "step": step, "info": info or {}, "files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    wait_for_everyone()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: If it has no manifest, or a file is missing, cut short or changed.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        step, files, info = manifest["step"], manifest["files"], manifest["info"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The {MANIFEST} of {path} is damaged: {error!r}") from error
    for name, expected in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} lacks {name}, which its manifest lists")
        if describe_file(path / name) != expected:
            raise CheckpointError(f"{path / name} is not the file that the manifest describes")
    return Checkpoint(path, step, info)


def find_checkpoint(output_dir: str | Path, name: str = "latest") -> Checkpoint | None:
    """The checkpoint to resume from: `"latest"`, the name of a checkpoint in `output_dir`, or a path to one.

    Returns:
        The newest complete checkpoint for `"latest"` (incomplete ones are named in a warning), None if there is none.

    Raises:
        CheckpointError: If a checkpoint asked for by name is not there, or not complete.
    """
    if name != "latest":
        inside = Path(output_dir) / name
        if not inside.is_dir() and not Path(name).is_dir():
            there = ", ".join(path.name for path in _checkpoint_folders(output_dir)) or "none"
            raise CheckpointError(f"There is no checkpoint {name}, neither in {output_dir} nor here. There: {there}.")
        return read_checkpoint(inside if inside.is_dir() else name)
    return next(_readable(reversed(_checkpoint_folders(output_dir))), None)


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


def delete_old_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (at least 1), and what killed runs left half-written."""
    if keep < 1:
        raise ValueError(f"At least one checkpoint must be kept, got {keep}.")
    for path in _checkpoint_folders(output_dir)[:-keep]:
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        doomed = beside(path, "old")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    _delete_leftovers(output_dir)


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


def _delete_leftovers(output_dir: str | Path) -> None:
    for leftover in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _checkpoint_folders(output_dir: str | Path) -> list[Path]:
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))
