"""Universal compression of a stream of ids: LZ78 phrases, and deflate or LZMA over packed ids."""

from __future__ import annotations

import lzma
import zlib

import numba
import numpy as np


def deflate(data: bytes, level: int = 9) -> int:
    """Bytes of gzip's algorithm, without the file header."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return len(packer.compress(data)) + len(packer.flush())


def xz(data: bytes) -> int:
    """Bytes of LZMA2 at the highest preset, without the file header."""
    window = 1 << max(12, min(26, len(data).bit_length()))  # no larger than the data: it is cleared each time
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def pack_fixed(ids: np.ndarray, vocab_size: int) -> bytes:
    """Write ids with the same number of bytes each, low byte first: 2 below 65,537 tokens."""
    width = 1 if vocab_size <= 1 << 8 else 2 if vocab_size <= 1 << 16 else 3 if vocab_size <= 1 << 24 else 4
    return np.ascontiguousarray(ids.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]).tobytes()


def ranks(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Number ids by falling frequency (ties by id): the new ids, and how many there are."""
    counts = np.bincount(ids)
    used = np.flatnonzero(counts)
    rank = np.zeros(len(counts), np.int64)
    rank[used[np.argsort(-counts[used], kind="stable")]] = np.arange(len(used))
    return rank[ids], len(used)


def pack_ranked(ids: np.ndarray) -> bytes:
    """Write ids, numbered by frequency, with fewer bytes for more frequent ones.

    The first byte of a frequent id is its rank; the last of the 256 values begin longer ones, as few as are needed:
    one byte below 256 ids, else one or two, else one to three.
    """
    number, count = ranks(ids)
    return pack_numbers(number, count)


def pack_numbers(number: np.ndarray, count: int) -> bytes:
    """Write numbers below `count`, one byte for small ones; see `pack_ranked`."""
    escapes = 0
    while (256 - escapes) + escapes * 256 < count and escapes < 224:
        escapes += 1
    short = 256 - escapes
    if short + escapes * 256 >= count:
        return _two_bytes(number, short).tobytes()
    short = 192  # 192 + 32 * 256 + 32 * 65,536 numbers
    return _three_bytes(number, short).tobytes()


@numba.njit(cache=True)
def _two_bytes(number: np.ndarray, short: int) -> np.ndarray:
    out = np.empty(2 * len(number), np.uint8)
    n = 0
    for value in number:
        if value < short:
            out[n] = value
            n += 1
        else:
            out[n] = short + (value - short) // 256
            out[n + 1] = (value - short) % 256
            n += 2
    return out[:n]


@numba.njit(cache=True)
def _three_bytes(number: np.ndarray, short: int) -> np.ndarray:
    out = np.empty(3 * len(number), np.uint8)
    n = 0
    for value in number:
        if value < short:
            out[n] = value
            n += 1
            continue
        rest = value - short
        if rest < 32 * 256:
            out[n] = short + rest // 256
            out[n + 1] = rest % 256
            n += 2
        else:
            rest -= 32 * 256
            out[n] = short + 32 + rest // 65536
            out[n + 1] = rest // 256 % 256
            out[n + 2] = rest % 256
            n += 3
    return out[:n]


@numba.njit(cache=True, nogil=True)
def lz78_phrases(ids: np.ndarray) -> int:
    """Parse into phrases, each the longest one seen plus one symbol (Ziv and Lempel 1978); count them, O(n)."""
    size = 16
    while size < 2 * len(ids) + 2:
        size *= 2
    keys = np.zeros(size, np.int64)  # node * 2^31 + symbol, plus one: 0 is free
    values = np.zeros(size, np.int64)
    phrases, node = 0, 0
    for symbol in ids:
        key = node * 2147483648 + symbol + 1
        slot = (key * -7046029254386353131 >> 20) & (size - 1)
        while keys[slot] != 0 and keys[slot] != key:
            slot = (slot + 1) & (size - 1)
        if keys[slot] == key:
            node = values[slot]
        else:
            phrases += 1
            keys[slot], values[slot] = key, phrases
            node = 0
    return phrases + (1 if node else 0)
