"""StochasTok: an LM trained on randomly split tokens reads other spellings of a text nearly as well as its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from tokenary.claims.small_lm import nll, small_lm, train
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.data import enwik8, prose, stdlib_code
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.stochastok import SplitTable, expand
from tokenary.tokenize.training import train_bpe

CONTEXT = 96
EQUAL_TEXT = "stochastok, equal text"


def run(
    seed: int = 0,
    steps: int = 180,
    batch: int = 16,
    repeats: int = 3,
    megabytes: float = 4.0,
    vocab: int = 2048,
    p: float = 0.1,
    split: float = 0.5,
    text: Literal["enwik8", "code", "prose"] = "enwik8",
) -> Outcome:
    """Train small LMs on a text, and measure what reading it re-split costs them.

    Parameters
    ----------
    seed : int
        Of weights, order and splits.
    steps, batch : int
        Of training, sequences of 96 tokens: equal tokens for every arm, but for the one of equal text.
    repeats : int
        Trainings of each arm; the one of equal text is trained once.
    megabytes : float
        Of text; the last tenth, at most 40 kB, is held out.
    vocab : int
        Of the BPE that is trained on it.
    p : float
        Attempts a token in training; the dropout of BPE-dropout too.
    split : float
        Attempts a token in the held-out text as it is re-split for the test.
    text : {"enwik8", "code", "prose"}
        Encyclopedia, the interpreter's sources, a novel.
    """
    size = int(megabytes * 1e6)
    data = {
        "enwik8": lambda: enwik8(size).decode(errors="ignore"),
        "code": lambda: stdlib_code(seed, size),
        "prose": prose,
    }[text]()
    held = min(len(data) // 10, 40_000)
    learned, test = data[:-held], data[-held:]
    chunks = [learned[i : i + 2000] for i in range(0, len(learned), 2000)]
    tokenizer = train_bpe(chunks, vocab)
    table = SplitTable.of(tokenizer)
    canonical = tokenizer.encode(test)
    resplit = [expand(canonical, table, split, seed, f"test {n}").ids for n in range(2)]
    growth: list[float] = []

    def tokens_of(arm: str, number: int, name: str) -> np.ndarray:
        if arm == "bpe-dropout":
            return np.array(dropping.encode(chunks[number], add_special_tokens=False).ids, np.int32)
        ids = tokenizer.encode(chunks[number])
        if arm == "none":
            return ids
        made = expand(ids, table, p, seed, name).ids
        growth.append(len(made) / len(ids) - 1)
        return made

    dropping = Tokenizer.from_str(tokenizer.to_json())
    dropping.model.dropout = p

    def read(arm: str, repeat: int) -> Iterator[np.ndarray]:
        stream = substream(seed, "stochastok claim", repeat)
        for epoch in itertools.count():
            for number in stream.permutation(len(chunks)):
                yield tokens_of(arm, int(number), f"{repeat}:{epoch}:{number}")

    arms: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(repeats):
        for arm in ("stochastok", "none", "bpe-dropout", *[EQUAL_TEXT] * (not repeat)):
            model = small_lm(seed * 1000 + repeat, tokenizer.id_limit)
            more = 1 + float(np.mean(growth)) if arm == EQUAL_TEXT else 1.0
            train(model, _batches(read(arm, repeat), batch), int(steps * more))
            usual = _bits(model, canonical, tokenizer)
            other = float(np.mean([_bits(model, ids, tokenizer) for ids in resplit]))
            arms.setdefault(arm, []).append((usual, other))
    start = np.array([usual for usual, _ in arms["none"]])  # a loss on the usual tokens is charged, too
    gaps = {arm: np.array([other for _, other in found]) - start[: len(found)] for arm, found in arms.items()}
    usual_of = {arm: float(np.mean([usual for usual, _ in found])) for arm, found in arms.items()}

    def figure(arm: str) -> Figure:
        return Figure.of(arm, gaps[arm])

    return Outcome(
        method=figure("stochastok"),
        baseline=figure("none"),
        controls=(figure("bpe-dropout"),),
        n=len(canonical),
        runs=repeats,
        paired_spread=standard_error(gaps["stochastok"] - gaps["none"]),
        details={
            "gap": {arm: float(values.mean()) for arm, values in gaps.items()},
            "bits_a_byte_usual": usual_of,
            "rise_of_usual": usual_of["stochastok"] / usual_of["none"] - 1,
            "growth_in_training": float(np.mean(growth)),
            "growth_in_test": float(np.mean([len(ids) / len(canonical) - 1 for ids in resplit])),
        },
    )


def _batches(texts: Iterator[np.ndarray], batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut texts, one behind the other, into batches; an LM predicts its own input."""
    rest = np.empty(0, np.int32)
    for text in texts:
        rest = np.concatenate([rest, text])
        while len(rest) >= batch * CONTEXT:
            ids = torch.from_numpy(rest[: batch * CONTEXT].astype(np.int64)).view(batch, CONTEXT)
            rest = rest[batch * CONTEXT :]
            yield ids, ids


def _bits(model: Any, ids: np.ndarray, tokenizer: TextTokenizer) -> float:
    """Bits a byte of a whole text, in pieces."""
    total = 0.0
    usable = len(ids) // CONTEXT * CONTEXT
    pieces = torch.from_numpy(ids[:usable].astype(np.int64)).view(-1, CONTEXT)
    n_bytes = tokenizer.byte_lengths[ids[:usable].reshape(-1, CONTEXT)[:, 1:]].sum()
    with torch.inference_mode():
        for some in pieces.split(32):
            total += float(nll(model, some, some).sum())
    return total / math.log(2) / float(n_bytes)


CLAIM = Claim(
    slug="stochastok",
    statement="Re-splitting a held-out text at random costs a small LM trained with p=0.1 for as many tokens at most "
    "70% of the bits a byte that it costs one trained without, both over what that one needs for the usual tokens",
    metric="bits a byte on re-split held-out text, over those of a model trained without on the usual tokens",
    direction="lower",
    threshold=1 / 0.7,
    run=run,
    variation="Python source instead of an encyclopedia, every token attempted in the test",
    held_out={"text": "code", "split": 1.0},
    model="",
    minutes=15,
    fast={"steps": 25, "batch": 8, "repeats": 1, "vocab": 512, "text": "prose"},
)
