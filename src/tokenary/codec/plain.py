"""Compression without a model, for what is not text: the smallest of four ways that every Python can undo."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenary.core.errors import InputError

RAW, DEFLATE, BZIP2, LZMA = range(4)
NAMES = ("raw", "deflate", "bzip2", "lzma")
_MOST = 1 << 26  # the dictionary of xz -9


class _Raw:
    def compress(self, data: bytes) -> bytes:
        return data

    def decompress(self, data: bytes, most: int = -1) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _filters(size: int) -> list[dict[str, Any]]:
    dictionary = max(1 << 16, min(_MOST, 1 << max(size - 1, 1).bit_length()))
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]


def packer(method: int, size: int) -> Any:
    """Return a compressor with ``compress(data)`` and ``flush()`` for a stream of `size` bytes."""
    makers: tuple[Callable[[], Any], ...] = (
        _Raw,
        lambda: zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9),
        lambda: bz2.BZ2Compressor(9),
        lambda: lzma.LZMACompressor(lzma.FORMAT_RAW, filters=_filters(size)),
    )
    return makers[method]()


def pack(data: bytes) -> tuple[int, bytes]:
    """Compress in the way that gives fewest bytes; return it and them."""
    tried = []
    for method in range(len(NAMES)):
        made = packer(method, len(data))
        tried.append((method, made.compress(data) + made.flush()))
    return min(tried, key=lambda pair: len(pair[1]))


def unpack(method: int, data: bytes, size: int) -> bytes:
    """Undo `pack`.

    Raises
    ------
    InputError
        If the data are not what `pack` gave for `size` bytes.
    """
    found = b"".join(unpack_stream(method, [data], size))
    if len(found) != size:
        raise InputError(f"packed data hold {len(found)} bytes instead of {size}")
    return found


def unpack_stream(method: int, pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Undo a `packer`, piece by piece.

    Raises
    ------
    InputError
        Data that no `packer` wrote.
    """
    if method >= len(NAMES):
        raise InputError(f"unknown packing {method}")
    if not size:
        return
    reader: Any
    if method == DEFLATE:
        reader = zlib.decompressobj(-zlib.MAX_WBITS)
    elif method == BZIP2:
        reader = bz2.BZ2Decompressor()
    elif method == LZMA:
        reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(size))
    else:
        reader = _Raw()
    try:
        for piece in pieces:
            yield reader.decompress(piece)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise InputError(f"packed data are broken ({NAMES[method]})") from error


def sizes(pieces: Callable[[], Iterable[bytes]], size: int) -> list[int]:
    """Return the packed size of a stream for every method, without keeping it."""
    makers = [packer(method, size) for method in range(len(NAMES))]
    totals = [0] * len(makers)
    for piece in pieces():
        for method, made in enumerate(makers):
            totals[method] += len(made.compress(piece))
    return [total + len(made.flush()) for total, made in zip(totals, makers, strict=True)]
