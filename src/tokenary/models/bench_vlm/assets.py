"""What scenes are drawn from: real fonts, real handwritten digits, real photographs; each cut into three splits.

The arrays lie in ``files/assets.npz`` (no pickled objects), so that a scene is the same on every machine and needs
neither fonts nor an image library. Fonts are split by family, digit images by number, photographs by where a crop is
taken, words by a hash of their letters.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FILE = Path(__file__).with_name("files") / "assets.npz"

#: Characters of the reading tasks; O and I are left out, they look like 0 and 1.
GLYPHS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
CAP_HEIGHT = 20  # pixels of a capital letter in the file
PHOTOS = ("person", "cat", "cup", "rocket", "stars", "eye", "coins", "brick", "grass", "flower", "temple")


@dataclass(frozen=True)
class Assets:
    """The arrays of the file.

    Attributes
    ----------
    glyphs : (fonts, len(GLYPHS), 24, W) uint8
        Coverage 0 to 15; row 0 is the top of a capital letter, row 20 the base line.
    glyph_widths : (fonts, len(GLYPHS)) uint8
        Columns in use.
    fonts : dict of Split to array of int
        Font numbers of each split.
    digits, digit_labels : (1797, 8, 8) uint8, (1797,) uint8
        Handwritten digits of scikit-learn (UCI), values 0 to 16.
    photos : (11, 160, 160, 3) uint8
        Photographs that ship with scikit-image and scikit-learn, in the order of `PHOTOS`.
    """

    glyphs: NDArray[np.uint8]
    glyph_widths: NDArray[np.uint8]
    fonts: dict[Split, NDArray[np.int64]]
    digits: NDArray[np.uint8]
    digit_labels: NDArray[np.uint8]
    photos: NDArray[np.uint8]

    def digit_numbers(self, split: Split) -> NDArray[np.int64]:
        """Numbers of the digit images of a split: the last 180 test, the 180 before them validation."""
        bounds = {"train": (0, -360), "val": (-360, -180), "test": (-180, None)}[split]
        return np.arange(len(self.digits))[slice(*bounds)]


@cache
def assets() -> Assets:
    """Read the file once a process."""
    with np.load(FILE, allow_pickle=False) as file:
        splits = file["font_splits"]
        return Assets(
            glyphs=file["glyphs"],
            glyph_widths=file["glyph_widths"],
            fonts={split: np.flatnonzero(splits == split) for split in SPLITS},
            digits=file["digits"],
            digit_labels=file["digit_labels"],
            photos=file["photos"],
        )


def split_of(*key: object) -> Split:
    """Assign a word, a pair of objects or a row of values to its split, by a hash: 80 % train, 10 % each held out."""
    bucket = zlib.crc32(repr(key).encode()) % 10
    return "val" if bucket == 0 else "test" if bucket == 1 else "train"


@cache
def scaled_glyphs(font: int, height: int) -> tuple[NDArray[np.uint8], ...]:
    """All glyphs of one font at another capital height, as coverages 0 to 255 of shape (1.2 height, width)."""
    data = assets()
    rows = _area_weights(data.glyphs.shape[2], round(1.2 * height))
    scaled = []
    for glyph, width in zip(data.glyphs[font], data.glyph_widths[font].tolist(), strict=True):
        columns = _area_weights(width, max(2, round(width * height / CAP_HEIGHT)))
        coverage = rows @ (glyph[:, :width] * np.float32(17)) @ columns.T
        scaled.append(np.clip(coverage * 1.2, 0, 255).astype(np.uint8))  # thin strokes stay visible when they shrink
    return tuple(scaled)


def resize(image: NDArray[np.generic], height: int, width: int) -> NDArray[np.float32]:
    """Resample (H, W, ...) to (height, width, ...) by area, linearly where it grows."""
    flat = image.astype(np.float32)
    flat = np.tensordot(_area_weights(image.shape[0], height), flat, axes=(1, 0))
    flat = np.tensordot(_area_weights(image.shape[1], width), flat, axes=(1, 1))
    return flat.swapaxes(0, 1)


@cache
def _area_weights(source: int, target: int) -> NDArray[np.float32]:
    """Rows of a (target, source) resampling matrix: a triangle at least one source pixel wide round each centre."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(source)) / max(scale, 1.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
