"""What compressing a file would give and take, from a sample of its text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from tokenary.codec.blocks import Machine
from tokenary.codec.files import without_model
from tokenary.codec.lockstep import encode
from tokenary.codec.plain import pack

_SAMPLES, _TOKENS = 4, 512
_PIECE = 1 << 18


@dataclass(frozen=True)
class Estimate:
    """A forecast.

    Attributes
    ----------
    size, text : int
        Bytes of the file, and how many of them are text.
    packed : int
        Bytes of the archive.
    seconds : float
        To compress with one worker, the model loaded. To decompress takes up to twice as long.
    sampled : int
        Bytes of text that were coded to find out.
    """

    size: int
    text: int
    packed: int
    seconds: float
    sampled: int


def estimate(source: IO[bytes], prepare: Callable[[], Machine]) -> Estimate:
    """Code a few hundred tokens at four places, and scale up.

    The size is that of the second half of each sample, which has context as most of a file has; what the ensemble would
    learn over a longer text is not in it, so that it is rather too high. A file that `compress` would pack plainly is
    packed plainly here.

    Parameters
    ----------
    source : binary file
        The original, which can seek.
    prepare : callable
        Loads the model; called only where it would be used.
    """
    plain = without_model(source)
    size = plain.header.size
    if plain.enough:
        return Estimate(size, plain.text, plain.packed, 0.0, 0)
    machine = prepare()
    texts: list[list[int]] = []
    binary = packed = 0
    for number in range(_SAMPLES):
        source.seek(max(0, size - _PIECE) * number // max(_SAMPLES - 1, 1))
        data = source.read(_PIECE)
        pieces = [segment for segment in machine.spelling.segments(data[: _TOKENS * 16])]
        other = b"".join(piece.data for piece in pieces if not piece.text)
        binary, packed = binary + len(other), packed + len(pack(other)[1])
        texts.append([token for piece in pieces for token in piece.tokens][:_TOKENS])
    texts = sorted((text for text in texts if text), key=len, reverse=True)
    text = plain.text
    rest = (size - text) * packed // max(binary, 1)
    if not texts:
        return Estimate(size, text, plain.packed, 0.0, 0)
    at: list[tuple[int, int]] = []
    lanes = machine.codec.open(machine.reader, len(texts))
    began = time.perf_counter()
    ensemble = machine.codec.ensemble(machine.reader.vocab_size, len(texts))
    encode(lanes, ensemble, texts, machine.start, lambda done, coded: at.append((done, coded)))
    seconds = time.perf_counter() - began
    tokens, half = at[-1][0], at[len(at) // 2]
    later = at[-1] if len(at) > 64 else (0, 0)
    bytes_of_token = sum(len(machine.spelling.decode(ids)) for ids in texts) / tokens
    share = (later[1] - half[1]) / max(later[0] - half[0], 1) if later[0] else at[-1][1] / tokens
    return Estimate(
        size,
        text,
        min(plain.packed, round(rest + text / bytes_of_token * share)),
        text / bytes_of_token * seconds / tokens,
        round(bytes_of_token * tokens),
    )
