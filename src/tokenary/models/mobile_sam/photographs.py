"""Real photographs, and a point on something in each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenary.core.errors import InputError


class Photograph(NamedTuple):
    """A picture and what to ask about.

    Attributes
    ----------
    name : str
    pixels : (h, w, 3) uint8
    points : tuple of (int, int)
        Column and row of points on things.
    """

    name: str
    pixels: NDArray[np.uint8]
    points: tuple[tuple[int, int], ...]


#: By the name under which scikit-image carries the picture.
POINTS: dict[str, tuple[tuple[int, int], ...]] = {
    "astronaut": ((220, 110), (180, 400), (440, 60)),
    "chelsea": ((230, 160), (170, 130)),
    "coffee": ((300, 160), (480, 330)),
    "rocket": ((322, 220), (100, 60)),
    "coins": ((55, 55), (330, 280)),
    "motorcycle_left": ((380, 300), (150, 330)),
}


def photographs(count: int | None = None) -> list[Photograph]:
    """Return photographs that scikit-image carries, with points on things that they show.

    Parameters
    ----------
    count : int, optional
        Only the first so many.

    Raises
    ------
    InputError
        scikit-image is missing.
    """
    try:
        from pathlib import Path

        from skimage import data, io
    except ImportError as error:
        raise InputError("the photographs are scikit-image's: pip install 'tokenary[vision]'") from error
    folder = Path(data.__file__).parent
    found = []
    for name, points in list(POINTS.items())[:count]:
        file = next(iter(sorted(folder.glob(f"{name}.*"))))
        pixels = np.asarray(io.imread(file))
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., :3]
        found.append(Photograph(name, pixels, points))
    return found
