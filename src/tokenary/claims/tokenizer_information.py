"""Tokenizer information: merges that gzip likes give shorter compressed streams than the most frequent pairs."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.data import prose, stdlib_code
from tokenary.tokenize.base import EncodedText
from tokenary.tokenize.parallel import brotli_texts
from tokenary.tokenize.tokenizer_information.compression import deflate, xz
from tokenary.tokenize.tokenizer_information.grams import Grams, sequential
from tokenary.tokenize.tokenizer_information.lz_bpe import Serial, Trained, serialise, train_lz_bpe


def run(
    seed: int = 0,
    texts: Literal["brotli", "code", "prose"] = "brotli",
    vocab_size: int = 1024,
    candidates: int = 32,
    splits: int = 3,
    train_kb: int = 200,
    validation_kb: int = 60,
    test_kb: int = 100,
    serial: Serial = "fixed",
) -> Outcome:
    """Train both rules on the same pieces of text, and compress held-out pieces.

    Parameters
    ----------
    seed : int
        Deals the pieces out.
    texts : {"brotli", "code", "prose"}
        Four English books and lectures, the interpreter's sources, or the shipped prose.
    vocab_size : int
        Tokens of both.
    candidates : int
        Pairs that are tried at each step.
    splits : int
        Deals.
    train_kb, validation_kb, test_kb : int
        Thousands of bytes.
    serial : {"fixed", "ranked"}
        How ids are written, in training and in the test.
    """
    rows: list[dict[str, float]] = []
    stops: list[int | None] = []
    for split in range(splits):
        train, validation, test = _deal(texts, seed, split, [train_kb * 1000, validation_kb * 1000, test_kb * 1000])
        raw = test.encode()

        def trained(
            score: Literal["count", "gzip", "random"], train: str = train, check: str = validation, split: int = split
        ) -> Trained:
            return train_lz_bpe([train], check, vocab_size, candidates, score, serial, level=6, seed=seed + split)

        row: dict[str, float] = {"raw gzip": deflate(raw), "raw xz": xz(raw)}
        row["bytes"] = deflate(serialise(np.frombuffer(raw, np.uint8).astype(np.int32), serial))
        for name, made in (("lz", trained("gzip")), ("bpe", trained("count")), ("random", trained("random"))):
            ids = made.encode(test)
            fixed, ranked = serialise(ids, "fixed"), serialise(ids, "ranked")
            row |= {
                name: deflate(serialise(ids, serial)),
                f"{name} ranked": deflate(ranked),
                f"{name} xz fixed": xz(fixed),
                f"{name} xz ranked": xz(ranked),
                f"{name} tokens": len(ids),
            }
            for order in (1, 2):
                grams = Grams.of([EncodedText("", "", test, ids)], order)
                row[f"{name} order-{order} code"] = sequential(grams, vocab_size) / 8
            if name == "lz":
                stops.append(made.natural_stop)
            if name == "bpe":  # the cheap rival: plain BPE of another size
                for size in (512, 768):
                    fewer = made.encode(test, size - 256)
                    row[f"bpe {size}"] = deflate(serialise(fewer, serial))
        rows.append({key: float(value) for key, value in row.items()} | {"test bytes": float(len(raw))})

    counts = {"lz tokens", "bpe tokens", "random tokens", "test bytes"}

    def per_byte(name: str) -> np.ndarray:
        return np.array([8 * row[name] / row["test bytes"] for row in rows])

    def figure(name: str, label: str = "") -> Figure:
        return Figure.of(label or name, per_byte(name))

    return Outcome(
        method=figure("lz", "LZ-aware BPE"),
        baseline=figure("bpe", "BPE"),
        controls=(figure("random"), figure("bytes", "no merges"), figure("raw gzip", "none")),
        n=splits,
        runs=splits,
        paired_spread=standard_error(per_byte("lz") - per_byte("bpe")),
        details={
            "splits": rows,
            "shorter_by_2%": sum(row["lz"] <= 0.98 * row["bpe"] for row in rows),
            "natural_stop": stops,
            "mean_bits_per_byte": {name: float(per_byte(name).mean()) for name in rows[0] if name not in counts},
        },
    )


def _deal(texts: str, seed: int, split: int, sizes: list[int]) -> list[str]:
    """Deal blocks of text out to training, validation and test, so that each holds something of everything."""
    if texts == "brotli":
        whole = "".join(text for _, text in sorted(brotli_texts().items()))
    else:
        whole = prose() if texts == "prose" else stdlib_code(seed + split, sum(sizes) + 20_000)
    block = 4000
    blocks = [whole[start : start + block] for start in range(0, len(whole), block)]
    order = substream(seed, "tokenizer-information claim", split).permutation(len(blocks))
    dealt, at = [], 0
    for size in sizes:
        count = max(1, min(size // block, len(blocks) * size // sum(sizes)))
        dealt.append("".join(blocks[i] for i in order[at : at + count]))
        at += count
    return dealt


CLAIM = Claim(
    slug="tokenizer-information",
    statement="At 1,024 tokens, BPE that takes the merge gzip likes best makes gzip's output on unseen text at least "
    "2% shorter than BPE that takes the most frequent pair",
    metric="bits a byte of held-out text under gzip, ids written alike",
    direction="lower",
    threshold=1 / 0.98,
    run=run,
    variation="Python source instead of English, ids written by frequency",
    held_out={"texts": "code", "serial": "ranked"},
    model="",
    minutes=6,
    fast={"texts": "prose", "vocab_size": 384, "candidates": 8, "splits": 2, "train_kb": 50, "validation_kb": 20}
    | {"test_kb": 30},
)
