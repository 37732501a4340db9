"""Files on this machine: cache folder, hashes, whole files, locks between processes, a full disk. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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
def written_whole(file: Path) -> Iterator[IO[bytes]]:
    """Yield a stream that becomes the file at the end; where that fails, what was there stays. Makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
        os.chmod(name, 0o644)  # mkstemp's files are the owner's alone
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with written_whole(file) as stream:
        stream.write((json.dumps(value, indent=1) + "\n").encode())


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
