"""Vectors of strings, to find the old tokens that a new one resembles.

``minilm`` compares meanings with a pretrained text encoder; ``characters`` compares spelling, needs nothing but the
strings, and takes no time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tokenary.core.files import cache_folder, disk_errors, locked, written_whole

Encoder = Literal["minilm", "characters"]
_GRAMS = range(1, 6)
_BUCKETS = 1024
_KEPT = 10_000  # so many strings are a vocabulary, whose vectors are kept on disk


def encode_strings(encoder: Encoder, strings: Sequence[str]) -> Tensor:
    """Return unit vectors (K, C) float32 of K strings.

    Parameters
    ----------
    encoder : {"minilm", "characters"}
        ``minilm`` is fetched (42 MB) when first used; its vectors of large vocabularies stay in the cache folder.
    strings : sequence of str
        None of them empty.

    Raises
    ------
    FetchError
        The encoder cannot be brought here.
    """
    if encoder == "characters":
        return _characters(strings)
    from tokenary.models import minilm

    if len(strings) < _KEPT:
        return minilm.encode(strings)
    digest = hashlib.sha256("\0".join([minilm.SHA256, *strings]).encode()).hexdigest()[:24]
    file = cache_folder() / "string-vectors" / f"{digest}.safetensors"
    with disk_errors(), locked(f"strings-{digest}"):
        if file.is_file():
            return load_file(file)["vectors"].float()
        vectors = minilm.encode(strings)
        with written_whole(file) as stream:
            stream.write(save({"vectors": vectors.half()}))
    return vectors.half().float()  # as the next call reads them


def _characters(strings: Sequence[str]) -> Tensor:
    """Count the 1- to 5-grams of each string between two borders, hashed with a sign."""
    rows: list[int] = []
    codes: list[int] = []
    for row, text in enumerate(strings):
        framed = f"\x02{text}\x03"
        grams = {framed[at : at + n] for n in _GRAMS for at in range(len(framed) - n + 1)} - {"\x02", "\x03"}
        codes += [zlib.crc32(gram.encode()) for gram in grams]
        rows += [row] * len(grams)
    code = torch.tensor(codes, dtype=torch.int64)
    place = torch.tensor(rows, dtype=torch.int64) * _BUCKETS + code % _BUCKETS
    vectors = torch.zeros(len(strings) * _BUCKETS).index_add(0, place, 2.0 * (code >> 31) - 1)
    return torch.nn.functional.normalize(vectors.view(-1, _BUCKETS), dim=-1)
