"""Files on this machine: cache folder, hashes, locks between processes, a full disk in one line. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from tokenary.core.errors import FetchError, TokenaryError


def cache_folder() -> Path:
    """Where everything fetched or computed once lives: ``TOKENARY_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("TOKENARY_CACHE") or platformdirs.user_cache_dir("tokenary"))


def sha256_of(file: Path) -> str:
    """Hash a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def one_line(error: BaseException) -> str:
    """Give the first line of an error's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock between processes, by a file in the cache folder."""
    from filelock import FileLock  # imports asyncio: not for those who only list what there is

    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        yield


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full disk, or a cache folder that cannot be written, into one line.

    Raises
    ------
    FetchError
        In place of either; every other error goes through.
    """
    try:
        yield
    except TokenaryError:
        raise
    except Exception as error:  # safetensors raises its own class for a full disk
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise FetchError(f"no space left on the disk that holds {cache_folder()}") from error
        if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
            raise FetchError(f"cannot write to {cache_folder()}: {one_line(error)}") from error
        raise
