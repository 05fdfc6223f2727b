"""Files behind `http(s)://`, `s3://`, `gs://` and `hf://`, read by ranges of bytes through fsspec.

Credentials and endpoints are taken from where each provider's own tools take them (environment, configuration files,
`hf auth login`), and never appear in a message.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.asyn import AsyncFileSystem, reset_lock

from ...extras import require
from .filesystem import ByteRange, FileSystem

__all__ = ["RemoteFileSystem", "add_suffix", "is_remote", "redact", "url_path"]

logger = logging.getLogger(__name__)

# What can be read, and the package by which fsspec reads it.
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
# Seconds before each new attempt: a longer outage ends the run, which can be resumed.
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
_PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, NotImplementedError)
_T = TypeVar("_T")

if hasattr(os, "register_at_fork"):
    # Older releases of fsspec do not do so themselves: a forked worker would wait for the thread of its parent.
    os.register_at_fork(after_in_child=reset_lock)


def is_remote(path: str) -> bool:
    """Whether this is a URL, not a path of this machine."""
    return "://" in path


def url_path(url: str) -> str:
    """A URL without its query string, which a signed link ends in; a path as it is."""
    return url.partition("?")[0] if is_remote(url) and url.startswith("http") else url


def add_suffix(url: str, suffix: str) -> str:
    """The URL or path of the file of a longer name beside one: `suffix` goes before the query string."""
    path = url_path(url)
    return path + suffix + url[len(path) :]


def redact(url: str) -> str:
    """A URL without what may be a secret: user, password, query string and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RemoteFileSystem(FileSystem):
    """Files of the service of a URL.

    What fails for a moment (a connection, HTTP 429 or 5xx) is tried again, up to five times within 15 seconds.
    """

    def __init__(self, url: str) -> None:
        self.scheme = url.partition("://")[0].lower()
        if self.scheme not in _PACKAGES or "::" in url:
            known = ", ".join(f"{scheme}://" for scheme in _PACKAGES)
            raise ValueError(f"{redact(url)!r} cannot be read. Give a path of this machine, or a URL with {known}.")
        package = _PACKAGES[self.scheme]
        require(package, "remote", f"Reading {redact(url)!r} needs {package}")
        self._sizes: dict[str, int] = {}

    def glob(self, pattern: str) -> list[str]:
        found = self._try(pattern, lambda: self._filesystem().glob(pattern, detail=True))
        paths = {self._url(path): info for path, info in found.items() if info.get("type") != "directory"}
        self._sizes.update({path: info["size"] for path, info in paths.items() if info.get("size") is not None})
        return sorted(paths)

    def size(self, path: str) -> int:
        if path not in self._sizes:
            size = self._try(path, lambda: self._filesystem().info(path)).get("size")
            if size is None:
                raise ValueError(f"The server does not say how large {redact(path)!r} is. Download it first.")
            self._sizes[path] = size
        return self._sizes[path]

    def version(self, path: str) -> str:
        """What changes when the file does: its size, and its checksum or time where the service tells it."""
        info = self._try(path, lambda: self._filesystem().info(path))
        facts = ("size", "etag", "content-md5", "last-modified", "lastmodified", "mtime", "generation", "blob_id")
        return "; ".join(f"{name}={value}" for name, value in sorted(info.items()) if name.lower() in facts)

    def check_ranges(self, path: str) -> None:
        """Raise `ValueError` if the server only sends whole files."""
        if not self.scheme.startswith("http") or self.size(path) < 2:
            return

        def probe() -> None:
            with self._filesystem().open(path, cache_type="none", block_size=1, size=self.size(path)) as file:
                file.seek(1)
                file.read(1)

        try:
            self._try(path, probe)
        except ValueError as error:
            raise ValueError(
                f"The server of {redact(path)!r} sends whole files only, not ranges of bytes. Download the shards, or "
                "put them where ranges can be read, such as S3 or nginx."
            ) from error

    def read(self, path: str, limit: int) -> bytes:
        size = self._try(path, lambda: self._filesystem().info(path)).get("size")
        if size is not None and size > limit:
            raise ValueError(
                f"{redact(path)!r} has {size:,} bytes, more than {limit:,}: it is not the file that is meant."
            )
        return self._try(path, lambda: self._filesystem().cat_file(path))

    def open(self, path: str) -> BinaryIO:
        return self._try(path, lambda: self._filesystem().open(path, "rb"))

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        contents: list[Any] = [b"" if one.size == 0 else None for one in ranges]
        for delay in (*RETRY_DELAYS, None):
            left = [place for place, content in enumerate(contents) if not isinstance(content, bytes)]
            if not left:
                break
            for place, content in zip(left, self._fetch([ranges[place] for place in left]), strict=True):
                gone = isinstance(content, FileNotFoundError) and not _is_transient(content)
                contents[place] = b"" if gone or _is_beyond_end(content) else content
            failed = next((place for place in left if isinstance(contents[place], Exception)), None)
            if failed is not None:
                self._wait(ranges[failed].path, contents[failed], delay)
        for one, content in zip(ranges, contents, strict=True):
            if len(content) > one.size:
                raise ValueError(f"The server of {redact(one.path)!r} does not keep to ranges of bytes.")
        return contents

    def show(self, path: str) -> str:
        return redact(path)

    def _fetch(self, ranges: Sequence[ByteRange]) -> list[Any]:
        """Bytes or an exception for each range, all at once."""
        filesystem = self._filesystem()
        if isinstance(filesystem, AsyncFileSystem):
            paths, starts, sizes = (list(column) for column in zip(*ranges, strict=True))
            ends = [start + size for start, size in zip(starts, sizes, strict=True)]
            try:
                return filesystem.cat_ranges(paths, starts, ends, on_error="return")
            except Exception as error:
                return [error] * len(ranges)

        def fetch_one(one: ByteRange) -> bytes | Exception:
            try:
                with filesystem.open(one.path, "rb", cache_type="none") as file:
                    file.seek(one.offset)
                    return file.read(one.size)
            except Exception as error:
                return error

        with ThreadPoolExecutor(min(16, len(ranges))) as pool:
            return list(pool.map(fetch_one, ranges))

    def _try(self, path: str, action: Callable[[], _T]) -> _T:
        """What an action gives, after new attempts if need be."""
        for delay in (*RETRY_DELAYS, None):
            try:
                return action()
            except Exception as error:
                self._wait(path, error, delay)
        raise AssertionError("_wait raises when no attempt is left")

    def _wait(self, path: str, error: Exception, delay: float | None) -> None:
        """Wait before the next attempt; after the last one raise what the error means, without secrets."""
        said = re.sub(r"\w+://[^\s'\"<>)]+", lambda match: redact(match.group()), str(error))  # it quotes whole URLs
        reason = f"{type(error).__name__}: {said}"
        if delay is not None and _is_transient(error):
            logger.warning("Cannot read %s (%s). Trying again in %g s.", redact(path), reason, delay)
            time.sleep(delay)
            return
        # The chain of causes would show the URL with its secrets in the traceback, hence `from None`.
        if isinstance(error, FileNotFoundError) and not _is_transient(error):
            raise FileNotFoundError(f"There is no file {redact(path)!r}.") from None
        if isinstance(error, PermissionError) or _statuses(error) & {401, 403}:
            raise PermissionError(f"The credentials at hand do not open {redact(path)!r} ({reason}).") from None
        if isinstance(error, ValueError):
            raise ValueError(f"Cannot read {redact(path)!r} ({reason}).") from None
        tried = f" after {len(RETRY_DELAYS) + 1} attempts" if delay is None else ""
        raise ConnectionError(f"Cannot read {redact(path)!r}{tried} ({reason}).") from None

    def _filesystem(self) -> fsspec.AbstractFileSystem:
        return _filesystem_of(self.scheme, os.getpid())

    def _url(self, path: str) -> str:
        """A path as fsspec lists it, with its scheme."""
        return path if is_remote(path) else f"{self.scheme}://{path}"


@cache
def _filesystem_of(scheme: str, _: int) -> fsspec.AbstractFileSystem:
    """The file system of a process.

    fsspec's thread does not live on in a forked worker, which therefore makes an instance of its own. That of the
    parent must stay alive there all the same: closing its connections would remove them from the `epoll` object that
    both share, and the parent would wait for ever.
    """
    # A compressed answer would have other ranges.
    options = {"headers": {"Accept-Encoding": "identity"}} if scheme.startswith("http") else {}
    return fsspec.filesystem(scheme, **options)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _statuses(error: BaseException) -> set[int]:
    """HTTP statuses of an error and its causes, in the places where aiohttp, botocore, gcsfs and httpx keep them."""
    found: set[Any] = set()
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {})
            found.add(response.get("HTTPStatusCode"))
        own = "status" if hasattr(cause, "status") else "code"
        found |= {getattr(cause, own, None), getattr(response, "status_code", None)}
    return {status for status in found if isinstance(status, int)}


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed. fsspec reports any failure of HTTP as a missing file, and its cause."""
    statuses = _statuses(error)
    if statuses:
        return all(status in (408, 429) or status >= 500 for status in statuses)
    root = list(_causes(error))[-1]
    return not isinstance(root, (*_PERMANENT, PermissionError, ImportError))


def _is_beyond_end(content: Any) -> bool:
    """Whether a range was refused because the file ends before it: HTTP 416, which s3fs calls an invalid range."""
    return isinstance(content, Exception) and (416 in _statuses(content) or "not satisfiable" in str(content))
