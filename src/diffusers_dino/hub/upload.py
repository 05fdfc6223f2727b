"""Upload a trained model, or write what would be uploaded to a folder: only the model, its card and samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..files import sha256_of
from .cards import CARD
from .folder import model_files, variant_of
from .privacy import Content, check_private

__all__ = ["files_to_push", "push_files", "push_folder", "replaced_weights", "write_files"]

CHECKSUMS = "SHA256SUMS"
_HTTP_ERROR = HfHubHTTPError.__mro__[1]  # base of all errors of the HTTP library that huggingface_hub has


def files_to_push(folder: str | os.PathLike, also: Iterable[str] = ()) -> dict[str, Content]:
    """What `push_folder` uploads, by path in the repository: a file, or the bytes of a config without private folders.

    Only what is listed here: the card; of a pipeline `model_index.json` with its components'
    configs and safetensors; of a conditioner or autoencoder its config and safetensors; of a LoRA its weights. Logs,
    checkpoints, arguments and validation pictures, which may show patients, stay.

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
    """Write what would be uploaded to a folder to carry, with `SHA256SUMS` for `sha256sum`.

    Args:
        files: By path: where each is, or what is in it.
        folder: Made if it does not exist; it must be empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder is not empty.
        OSError: If it cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give another folder for the model to carry.")
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, place)
    lines = [f"{sha256_of(folder / path)}  {path}\n" for path in sorted(files)]
    (folder / CHECKSUMS).write_text("".join(lines))
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
        files: By path in the repository: where each is, or what is in it.
        repo_id: `"org/name"`, or `"name"` in the token owner's own space; made if it does not exist.
        token: By default the one that `hf auth login` stored.
        private: Whether a repository that is made here is private.
        revision: Branch to commit to, made if it does not exist; by default `main`.
        create_pr: Open a pull request with the commit, which takes no right to write.
        commit_message: Of the commit.

    Returns:
        The commit; `pr_url` is that of the pull request.

    Raises:
        PermissionError: If the token is missing, wrong, or may not write there.
        ConnectionError: If the Hub cannot be reached, or offline mode is on.
    """
    api = HfApi(token=token)
    with _explained(repo_id, api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = replaced_weights(api.list_repo_files(repo_id, revision=revision), files)
        operations = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(path, content) for path, content in files.items()]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )


def push_folder(folder: str | os.PathLike, repo_id: str, *, also: Iterable[str] = (), **options: Any) -> str:
    """Upload a trained pipeline, LoRA, conditioner or autoencoder from the folder of its training.

    Args:
        folder: See `files_to_push`, which says what is uploaded and what is refused.
        repo_id: See `push_files`, which says what else can go wrong.
        also: Patterns of further files to upload, such as `"samples/*.png"`.
        options: Those of `push_files`: `token`, `private`, `revision`, `create_pr`, `commit_message`.

    Returns:
        The full id of the repository, `"org/name"`.
    """
    return push_files(files_to_push(folder, also), repo_id, **options).repo_url.repo_id


def replaced_weights(there: Iterable[str], files: Mapping[str, Content]) -> list[str]:
    """Weights in a repository that the new ones of the same component and variant take the place of.

    An index of several files is read before a single file: left behind, it would load the old weights.
    """
    new = {_weights_of(path) for path in files} - {None}
    return sorted(path for path in there if path not in files and _weights_of(path) in new)


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Say of an error of the Hub what to do about it."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub does not let you write to {repo_id}: log in with `hf auth login`, with a token that may write."
        ) from error
    except _HTTP_ERROR as error:
        raise ConnectionError(
            f"The Hub ({endpoint}) cannot be reached: {error}. Without a network, write a folder that can be carried."
        ) from error


def _weights_of(path: str) -> tuple[str, str | None] | None:
    """Component and variant of a weight file or its index; None for other files."""
    place = PurePosixPath(path)
    if not (place.suffix == ".safetensors" or ".safetensors.index." in place.name):
        return None
    return str(place.parent), variant_of(place.name)
