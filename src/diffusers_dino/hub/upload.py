"""Upload a trained model, or write what would be uploaded to a folder: only the model, its card and samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..files import lock_folder, make_writable_folder, sha256_of
from .cards import CARD
from .folder import model_files, variant_of
from .privacy import Content, check_private

__all__ = ["files_to_push", "push_files", "push_folder", "replaced_weights", "write_files"]

_HTTP_ERROR = HfHubHTTPError.__mro__[1]  # base of all errors of the HTTP library that huggingface_hub has


def files_to_push(folder: str | os.PathLike, also: Iterable[str] = ()) -> dict[str, Content]:
    """What `push_folder` uploads, by path in the repository: a file, or the bytes of a config without private folders.

    Only the card, and the configs and safetensors of the model and its components. Logs, checkpoints, arguments and
    validation pictures, which may show patients, stay.

    Args:
        folder: Written by `save_pretrained`, `save_lora_weights` or a training script.
        also: Patterns of further files, such as `"samples/*.png"`.

    Raises:
        FileNotFoundError: If the folder holds no model, or a part of it is missing.
        ValueError: If a card, config or header of weights names a user's folder or a DICOM UID.
    """
    folder = Path(folder)
    files = model_files(folder)
    further = [folder / CARD, *(path for pattern in also for path in sorted(folder.glob(pattern)))]
    files |= {path.relative_to(folder).as_posix(): path for path in further if path.is_file()}
    check_private(files)
    return files


def write_files(files: Mapping[str, Content], folder: str | os.PathLike) -> Path:
    """Write the files of `files_to_push` to a folder to carry, with `SHA256SUMS` for `sha256sum`, and return it.

    A file `lock` lies there until it is complete. A call that was killed goes on with the same files.

    Raises:
        FileExistsError: If the folder holds something else, or another call is at work there.
    """
    folder, sums, lock = make_writable_folder(folder), "SHA256SUMS", Path(folder, "lock")

    def check_free() -> None:
        ours = {lock.name, sums, *files} if lock.exists() else set()
        if any(path.relative_to(folder).as_posix() not in ours and not path.is_dir() for path in folder.rglob("*")):
            raise FileExistsError(f"{folder} is not empty: give another folder for the model to carry.")

    check_free()  # before anything is written there
    with lock_folder(folder, FileExistsError):
        check_free()
        for path, content in files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, place)
        lines = [f"{sha256_of(folder / path)}  {path}\n" for path in sorted(files)]
        (folder / sums).write_text("".join(lines))
        lock.unlink()
    return folder


def push_files(
    files: Mapping[str, Content],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Upload files in one commit, and remove the weights that they replace.

    Args:
        files: As `files_to_push` lists them.
        repo_id: `"org/name"`, or `"name"` in the token owner's own space; made if it does not exist.
        token: By default the one that `hf auth login` stored.
        private: Whether a repository that is made here is private; True refuses one that is there and public.
        revision: Branch to commit to, made if it does not exist; by default `main`.
        create_pr: Open a pull request with the commit, which takes no right to write; the result has its `pr_url`.
        commit_message: Of the commit.

    Raises:
        PermissionError: If the token is missing, wrong, or may not write there; see also `private`.
        ConnectionError: If the Hub cannot be reached, or offline mode is on.
    """
    api = HfApi(token=token)
    try:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(full_id).private:
            raise PermissionError(f"{full_id} is there already and is public: make it private, or name another.")
        if revision is not None and not create_pr:
            api.create_branch(full_id, branch=revision, exist_ok=True)
        stale = replaced_weights(api.list_repo_files(full_id, revision=revision), files)
        operations = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(path, content) for path, content in files.items()]
        return api.create_commit(
            full_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub does not let you write to {repo_id}: log in with `hf auth login`, with a token that may write."
        ) from error
    except _HTTP_ERROR as error:
        raise ConnectionError(
            f"The Hub ({api.endpoint}) cannot be reached: {error}. "
            "Without a network, write a folder that can be carried."
        ) from error


def push_folder(folder: str | os.PathLike, repo_id: str, *, also: Iterable[str] = (), **options: Any) -> str:
    """Upload a trained pipeline, LoRA, conditioner or autoencoder, and return the repository's full id, `"org/name"`.

    `files_to_push` says what is uploaded and refused, and what `folder` and `also` are. `push_files` says what else
    can go wrong, and what `repo_id` and the `options` are: `token`, `private`, `revision`, `create_pr`,
    `commit_message`.
    """
    return push_files(files_to_push(folder, also), repo_id, **options).repo_url.repo_id


def replaced_weights(there: Iterable[str], files: Mapping[str, Content]) -> list[str]:
    """Weights in a repository that the new ones of the same component and variant take the place of.

    An index of several files is read before a single file: left behind, it would load the old weights.
    """
    new = {_weights_of(path) for path in files} - {None}
    return sorted(path for path in there if path not in files and _weights_of(path) in new)


def _weights_of(path: str) -> tuple[str, str | None] | None:
    """Component and variant of a weight file or its index; None for other files."""
    place = PurePosixPath(path)
    if not (place.suffix == ".safetensors" or ".safetensors.index." in place.name):
        return None
    return str(place.parent), variant_of(place.name)
