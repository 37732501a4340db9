"""BPE that takes the merge a universal compressor likes best (the paper's LZ-aware rule).

At every step the `candidates` most frequent pairs of the training text are tried on a validation stream that is not
used for counting; the one whose merge gives the shortest compressed stream is taken, ties to the more frequent, then to
lower ids. The paper leaves open how ids are written for the compressor, which changes the ranking: `serial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokenary.core.errors import InputError, OptionError
from tokenary.core.seeding import substream
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.tokenizer_information.compression import deflate, lz78_phrases, pack_numbers, ranks
from tokenary.tokenize.training import Pairs, PairTable, byte_level, merge, to_array

Score = Literal["gzip", "lz78", "gain", "count", "random"]
Serial = Literal["fixed", "ranked"]


@dataclass(frozen=True)
class Trained:
    """A vocabulary and how it came about.

    Attributes
    ----------
    merges : list of (int, int)
        As `training.byte_level` takes them.
    sizes : list of float
        The score of the validation stream before the first and after every merge; empty where the score needs none.
    natural_stop : int or None
        After how many merges no candidate made the stream shorter for the first time; plain BPE has no such point.
    pattern : str or None
        Pieces that merges stay within.
    """

    merges: Pairs
    sizes: list[float]
    natural_stop: int | None
    pattern: str | None

    def tokenizer(self, name: str = "lz-bpe") -> TextTokenizer:
        """Return it as a tokenizer."""
        return byte_level(self.merges, self.pattern, name)

    def encode(self, text: str, count: int | None = None) -> np.ndarray:
        """Ids of a text after the first `count` merges, applied one after the other."""
        ids = to_array([text], self.pattern)
        for i, (left, right) in enumerate(self.merges[:count]):
            ids = merge(ids, left, right, 256 + i)
        return ids[ids >= 0]


def serialise(ids: np.ndarray, serial: Serial) -> bytes:
    """Write ids for a byte compressor: two bytes each, low byte first, or one or two by frequency."""
    if serial == "fixed":
        return ids.astype("<u2").tobytes()
    return pack_numbers(*ranks(ids))


def train_lz_bpe(
    texts: Sequence[str],
    validation: str,
    vocab_size: int,
    candidates: int = 32,
    score: Score = "gzip",
    serial: Serial = "fixed",
    level: int = 9,
    stop: bool = False,
    pattern: str | None = None,
    workers: int = 1,
    seed: int = 0,
    done: Callable[[int, int], None] = lambda merges, total: None,
) -> Trained:
    """Train merges by what they save.

    Parameters
    ----------
    texts : sequence of str
        Pairs are counted here.
    validation : str
        50 to 300 kB that are compressed at every step.
    vocab_size : int
        Tokens, the 256 bytes included; at most 65,536.
    candidates : int
        Most frequent pairs that are tried at each step.
    score : {"gzip", "lz78", "gain", "count", "random"}
        Length by deflate (the paper's), by LZ78 phrases, the gain of likelihood ``f_ab log2(f_ab n / (f_a f_b))`` which
        needs no validation, plain frequency (BPE), or any candidate at random (a control).
    serial : {"fixed", "ranked"}
        How ids are written for deflate.
    level : int
        Of deflate.
    stop : bool
        End where no candidate makes the stream shorter.
    pattern : str, optional
        Pieces that merges stay within; None for the whole text.
    workers : int
        Threads that try candidates.
    seed : int
        Of the random control.
    done : callable
        Told merges so far and their number.

    Raises
    ------
    OptionError, InputError
        An option out of range, or no text.
    """
    if not 257 <= vocab_size <= 1 << 16:
        raise OptionError("vocab_size", vocab_size, "257 to 65536")
    for name, value, least, most in (("candidates", candidates, 1, 1 << 16), ("level", level, 1, 9)):
        if not least <= value <= most:
            raise OptionError(name, value, f"{least} to {most}")
    if not any(texts):
        raise InputError("nothing to train on: the texts are empty")
    tried = score in ("gzip", "lz78")
    if tried and not validation:
        raise InputError("nothing to judge merges by: the validation text is empty")
    table, stream = PairTable(to_array(texts, pattern)), to_array([validation] if tried else [], pattern)
    merges: Pairs = []
    pieces = [bytes([byte]) for byte in range(256)]
    made = set(pieces)

    def length(ids: np.ndarray, size: int) -> float:
        ids = ids[ids >= 0]
        if score == "gzip":
            return float(deflate(serialise(ids, serial), level))
        phrases = int(lz78_phrases(ids))
        return phrases * (math.log2(max(phrases, 1)) + math.log2(size))

    sizes = [length(stream, 256)] if tried else []
    natural: int | None = None
    with ThreadPoolExecutor(workers) as pool:
        while len(pieces) < vocab_size:
            pairs = [pair for pair in table.top(1 if score == "count" else candidates) if pair[2] > 1]
            twice = [pair for pair in pairs if pieces[pair[0]] + pieces[pair[1]] in made]
            if twice:  # the same bytes by another way: a vocabulary holds them once
                for left, right, _ in twice:
                    table.ban(left, right)
                continue
            if not pairs:
                break
            new = len(pieces)

            def attempt(
                pair: tuple[int, int, int], stream: np.ndarray = stream, new: int = new
            ) -> tuple[float, np.ndarray]:
                ids = merge(stream, pair[0], pair[1], new)
                return length(ids, new + 1), ids

            best = 0
            if tried:
                found = list(pool.map(attempt, pairs))
                best = min(range(len(pairs)), key=lambda i: found[i][0])
                if found[best][0] >= sizes[-1] and natural is None:
                    natural = len(merges)
                if found[best][0] >= sizes[-1] and stop:
                    break
                stream = found[best][1]
                sizes.append(found[best][0])
            elif score == "gain":
                best = _largest_gain(table.ids, pairs)
            elif score == "random":
                best = int(substream(seed, "lz-bpe", "random", new).integers(len(pairs)))
            left, right, _ = pairs[best]
            table.merge(left, right, new)
            merges.append((left, right))
            pieces.append(pieces[left] + pieces[right])
            made.add(pieces[-1])
            done(len(merges), vocab_size - 256)
    return Trained(merges, sizes, natural, pattern)


def _largest_gain(ids: np.ndarray, pairs: Sequence[tuple[int, int, int]]) -> int:
    counts = np.bincount(ids[ids >= 0])
    n = int(counts.sum())
    return max(range(len(pairs)), key=lambda i: _gain(pairs[i], counts, n))


def _gain(pair: tuple[int, int, int], counts: np.ndarray, n: int) -> float:
    left, right, both = pair
    return both * math.log2(both * n / (int(counts[left]) * int(counts[right])))
