"""An Information-Theoretic Perspective on LLM Tokenizers (arXiv 2601.09039, 2026): a tokenizer as a lossless transform.

The stream of ids is measured as a source (entropies), as the use of a channel of V symbols a position, and as the input
of a universal compressor; with n tokens of a text of b bytes over a vocabulary of V:

    H1 = -sum p log2 p + (m - 1) / (2 n ln 2)     bits a token, m types seen (Miller and Madow); refused for n < 10 m
    H_k = bits of the next token given k - 1      as the length of a code that adapts while it reads (`grams`)
    U_k = H_k / log2 V,  eta_alpha = H_alpha / log2 V,  2^H1 / V,  dead tokens,  redundancy = log2 V - min H_k
    LZ78 = c (log2 c + log2 V) bits for c phrases; deflate and xz of the ids, 2 or 3 bytes each or by frequency

Tokenizers are compared in bits a **byte**; what it costs to send the vocabulary is given too. Runs of tokens and
compression are counted over the first `first_mb` of each file, one part of 4 MiB at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tokenary.core.card import Card
from tokenary.tokenize.base import EncodedText, Measure, TextTokenizer
from tokenary.tokenize.tokenizer_information.compression import deflate, lz78_phrases, pack_fixed, pack_ranked, xz
from tokenary.tokenize.tokenizer_information.grams import Grams, held_out, plug_in, sequential_orders

CARD = Card(
    slug="tokenizer-information",
    cls="TokenizerInformation",
    room="tokenize",
    slot="measure",
    title="An Information-Theoretic Perspective on LLM Tokenizers",
    summary="entropies, use of the vocabulary and compressed size of what a tokenizer makes of a text",
    paper="2601.09039",
    year=2026,
    requires=("tokenizer",),
)

ENOUGH = 10  # tokens a type below which no H1 is claimed
EXAMPLES = 5  # tokens that never occur of which are shown


@dataclass(frozen=True)
class Stream:
    """Counts of one language.

    Attributes
    ----------
    used : ndarray
        (2, m) int64: ids that occur, ascending, and how often.
    nbytes : int
        UTF-8 bytes of all texts.
    first_nbytes : int
        Those of the texts that `grams` and the sizes are over.
    grams : Grams
        Runs of tokens.
    sizes : dict
        Bytes after compression, by name.
    phrases : tuple of int
        LZ78 phrases of every part, ascending.
    """

    used: np.ndarray
    nbytes: int
    first_nbytes: int
    grams: Grams
    sizes: dict[str, int]
    phrases: tuple[int, ...]

    def __add__(self, other: Stream) -> Stream:
        ids, where = np.unique(np.concatenate([self.used[0], other.used[0]]), return_inverse=True)
        counts = np.zeros(len(ids), np.int64)
        np.add.at(counts, where, np.concatenate([self.used[1], other.used[1]]))
        names = sorted(self.sizes.keys() | other.sizes.keys())
        return Stream(
            np.stack([ids, counts]),
            self.nbytes + other.nbytes,
            self.first_nbytes + other.first_nbytes,
            self.grams + other.grams,
            {name: self.sizes.get(name, 0) + other.sizes.get(name, 0) for name in names},
            tuple(sorted(self.phrases + other.phrases)),
        )


@dataclass(frozen=True)
class Streams:
    """Counts of several languages."""

    of: dict[str, Stream]

    def __add__(self, other: Streams) -> Streams:
        names = sorted(self.of.keys() | other.of.keys())
        both = {name: [part.of[name] for part in (self, other) if name in part.of] for name in names}
        return Streams({name: found[0] if len(found) == 1 else found[0] + found[1] for name, found in both.items()})


class TokenizerInformation(Measure):
    """Measure what a tokenizer makes of a text as a source, a channel and the input of a compressor.

    Parameters
    ----------
    order : int
        Longest run of tokens: H1 to H_order.
    alpha : float
        Order of the Renyi entropy; the paper takes 2, others 2.5.
    compress : {"gzip", "xz", "lz78", "none"}
        Which compressors run: gzip stands for gzip and LZ78, xz, which is slow, for all three.
    first_mb : int
        Runs and compression look at so many MiB at the start of each file; H1 at everything.
    """

    def __init__(
        self,
        order: Annotated[int, Field(ge=1, le=4)] = 4,
        alpha: Annotated[float, Field(gt=0, le=100)] = 2.0,
        compress: Literal["gzip", "xz", "lz78", "none"] = "gzip",
        first_mb: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        self.order, self.alpha, self.compress, self.first = order, alpha, compress, first_mb << 20

    def count(self, tokenizer: TextTokenizer, texts: Sequence[EncodedText]) -> Streams:
        """Count one part: the texts of each language are one stream."""
        by_language: dict[str, list[EncodedText]] = {}
        for text in texts:
            by_language.setdefault(text.language, []).append(text)
        return Streams({name: self._stream(tokenizer, found) for name, found in sorted(by_language.items())})

    def _stream(self, tokenizer: TextTokenizer, texts: list[EncodedText]) -> Stream:
        counts = np.bincount(np.concatenate([text.ids for text in texts]))
        used = np.flatnonzero(counts)
        data = [text.text.encode() for text in texts]
        first = [i for i, text in enumerate(texts) if text.offset < self.first]
        head = np.concatenate([texts[i].ids for i in first]) if first else np.zeros(0, np.int32)
        with ThreadPoolExecutor() as pool:  # packing and parsing let others compute meanwhile
            packs = len(head) > 0 and self.compress != "none"
            phrases = [pool.submit(lz78_phrases, head)] if packs else []
            sizes = self._sizes(tokenizer, head, b"".join(data[i] for i in first), pool) if packs else {}
            grams = Grams.of([texts[i] for i in first], self.order)
        return Stream(
            np.stack([used, counts[used]]),
            sum(map(len, data)),
            sum(len(data[i]) for i in first),
            grams,
            {name: size.result() + more for name, (size, more) in sizes.items()},
            tuple(found.result() for found in phrases),
        )

    def _sizes(
        self, tokenizer: TextTokenizer, ids: np.ndarray, raw: bytes, pool: Executor
    ) -> dict[str, tuple[Future[int], int]]:
        """Let ids and the text itself be packed: for each name a size that will be known, and what is added to it."""
        if self.compress == "lz78":
            return {}
        fixed, ranked = pack_fixed(ids, tokenizer.id_limit), pack_ranked(ids)
        types = int(np.count_nonzero(np.bincount(ids)))
        table = -(-types * math.ceil(math.log2(tokenizer.id_limit)) // 8)
        sizes = {}
        for name, pack in (("gzip", deflate), ("xz", xz)) if self.compress == "xz" else (("gzip", deflate),):
            sizes[f"{name}_fixed"] = pool.submit(pack, fixed), 0
            sizes[f"{name}_ranked"] = pool.submit(pack, ranked), table
            sizes[f"{name}_raw"] = pool.submit(raw_size, pack, raw), 0
        return sizes

    def figures(self, tokenizer: TextTokenizer, counts: Streams) -> dict[str, Any]:
        """Return figures for each language and, as ``all``, for everything together."""
        found = {name: self.describe(tokenizer, stream) for name, stream in sorted(counts.of.items())}
        if len(found) > 1:
            whole = functools.reduce(lambda a, b: a + b, (counts.of[name] for name in sorted(counts.of)))
            found["all"] = self.describe(tokenizer, whole)
        return {
            "capacity": math.log2(tokenizer.vocab_size),
            "vocabulary_bits": vocabulary_bits(tokenizer),
            "alpha": self.alpha,
            "languages": found,
        }

    def describe(self, tokenizer: TextTokenizer, stream: Stream) -> dict[str, Any]:
        """Turn the counts of one language into figures."""
        n, m, capacity = int(stream.used[1].sum()), stream.used.shape[1], math.log2(tokenizer.vocab_size)
        if n == 0:
            return {"tokens": 0, "why": "no tokens"}
        values, times = np.unique(stream.used[1], return_counts=True)
        order0 = unigram_entropy(values, times)
        corrected = order0 + (m - 1) / (2 * n * math.log(2))
        claim = n >= ENOUGH * m
        per_byte = n / stream.nbytes
        renyi = renyi_entropy(values, times, self.alpha)
        ordinary = np.setdiff1d(tokenizer.ids, list(tokenizer.special_ids))
        dead = np.setdiff1d(ordinary, stream.used[0])
        found: dict[str, Any] = {
            "tokens": n,
            "types": m,
            "tokens_per_type": n / m,
            "bytes_per_token": 1 / per_byte,
            "h1": corrected if claim else None,
            "h1_plug_in": order0,
            "h1_bits_per_byte": corrected * per_byte if claim else None,
            "u1": corrected / capacity if claim else None,
            "renyi": renyi,
            "renyi_efficiency": renyi / capacity,
            "effective_vocabulary": 2**corrected / tokenizer.vocab_size if claim else None,
            "dead": len(dead),
            "dead_share": len(dead) / max(len(ordinary), 1),
            "dead_examples": [tokenizer.piece(i) for i in dead[:: max(len(dead) // EXAMPLES, 1)][:EXAMPLES].tolist()],
        }
        if not claim:
            found["why"] = f"H1 is not claimed: {n} tokens for {m} types, less than {ENOUGH} each"
        found["orders"] = self._orders(tokenizer, stream)
        if found["orders"]:
            rate = min(one["sequential"] for one in found["orders"].values())
            found["redundancy"] = capacity - rate
            found["best_bits_per_byte"] = rate * stream.grams.total / stream.first_nbytes
        found["compressed"] = self._compressed(tokenizer, stream)
        return found

    def _orders(self, tokenizer: TextTokenizer, stream: Stream) -> dict[str, dict[str, float | None]]:
        grams = dataclasses.replace(stream.grams)  # its levels go with it: they are larger than the counts
        found, n = {}, grams.total
        if n == 0:
            return {}
        upper = held_out(grams, tokenizer.id_limit)
        for order, bits in enumerate(sequential_orders(grams, tokenizer.id_limit), start=1):
            found[str(order)] = {
                "sequential": bits / n,
                "bits_per_byte": bits / stream.first_nbytes,
                "utilisation": bits / n / math.log2(tokenizer.vocab_size),
                "held_out": None if upper is None else upper[order - 1],
                "plug_in": plug_in(grams, order),
            }
        return found

    def _compressed(self, tokenizer: TextTokenizer, stream: Stream) -> dict[str, Any] | None:
        if not stream.phrases:
            return None
        capacity, b = math.log2(tokenizer.vocab_size), stream.first_nbytes
        bits = {"lz78": math.fsum(c * (math.log2(c) + capacity) for c in stream.phrases)}
        bits |= {name: 8.0 * size for name, size in sorted(stream.sizes.items())}
        vocabulary = vocabulary_bits(tokenizer)
        return {
            name: {
                "bits_per_byte": value / b,
                "with_vocabulary": (value + (0 if name.endswith("_raw") else vocabulary)) / b,
            }
            for name, value in bits.items()
        }


def unigram_entropy(values: np.ndarray, times: np.ndarray) -> float:
    """Entropy in bits, without correction, of types of which ``times[i]`` occur ``values[i]`` times each."""
    n = int((values * times).sum())
    return math.log2(n) - math.fsum((values * np.log2(values.astype(float)) * times).tolist()) / n


def renyi_entropy(values: np.ndarray, times: np.ndarray, alpha: float) -> float:
    """Renyi entropy in bits of order alpha; Shannon's where alpha is 1."""
    if alpha == 1:
        return unigram_entropy(values, times)
    p = values / int((values * times).sum())
    return math.log2(math.fsum((times * p**alpha).tolist())) / (1 - alpha)


def vocabulary_bits(tokenizer: TextTokenizer) -> int:
    """Bits to send the vocabulary: two ids a merge for BPE, else every token's bytes and a length byte."""
    if tokenizer.merges:
        return tokenizer.merges * 2 * math.ceil(math.log2(tokenizer.vocab_size))
    return int(8 * (tokenizer.byte_lengths.sum() + tokenizer.vocab_size))


@functools.lru_cache(maxsize=4)
def raw_size(pack: Callable[[bytes], int], data: bytes) -> int:
    """Compressed size of the text itself; remembered, for the next tokenizer of the same part."""
    return pack(data)
