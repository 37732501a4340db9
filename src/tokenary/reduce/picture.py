"""Draws what a reducer kept of a picture: kept patches bright, the others dim; merged ones in their common colour."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def kept_patches(
    pixels: Pixels, owners: NDArray[np.int64], numbers: NDArray[np.int64], grid: tuple[int, int], scale: int = 4
) -> Pixels:
    """Draw one view.

    Parameters
    ----------
    pixels : array
        (S, S, 3) uint8, what the encoder saw.
    owners : array
        (rows columns,) for each patch the token that stands for it, -1 for none.
    numbers : array
        The patches that tokens stand at; the others are dimmed, unless a token stands for several patches.
    grid : (int, int)
        Rows and columns of patches.
    scale : int
        Pixels drawn for one of the picture.

    Returns
    -------
    array
        (scale S, scale S, 3) uint8.
    """
    rows, columns = grid
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    image = pixels[: rows * high, : columns * wide].astype(np.float64)
    patches = image.reshape(rows, high, columns, wide, 3).transpose(0, 2, 1, 3, 4).reshape(-1, high, wide, 3)
    groups, counts = np.unique(owners[owners >= 0], return_counts=True)
    shown = patches.copy()
    dimmed = ~np.isin(np.arange(len(patches)), numbers) if not (counts > 1).any() else owners < 0
    for group in groups[counts > 1]:
        shown[owners == group] = patches[owners == group].mean((0, 1, 2))
    grey = patches.mean(-1, keepdims=True) * 0.3 + 16
    shown = np.where(dimmed[:, None, None, None], grey, shown)
    joined = (
        shown.reshape(rows, columns, high, wide, 3).transpose(0, 2, 1, 3, 4).reshape(rows * high, columns * wide, 3)
    )
    large = joined.repeat(scale, 0).repeat(scale, 1)
    _edges(large, np.where(dimmed, -1, owners).reshape(rows, columns), high * scale, wide * scale)
    return large.round().clip(0, 255).astype(np.uint8)


def _edges(image: NDArray[np.float64], owners: NDArray[np.int64], high: int, wide: int) -> None:
    """Draw light lines between tokens that are shown and whatever lies beside them."""
    rows, columns = owners.shape
    for row in range(rows):
        for column in range(columns):
            here, top, left = owners[row, column], row * high, column * wide
            if row and here != owners[row - 1, column]:
                image[top, left : left + wide] = 235
            if column and here != owners[row, column - 1]:
                image[top : top + high, left] = 235


def png(pixels: Pixels) -> bytes:
    """Encode (H, W, 3) uint8 as a PNG file."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
