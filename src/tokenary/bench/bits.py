"""Bits a byte: how well a model predicts text, in a unit that does not depend on how the text is cut into tokens.

Every window of text has a context and a body, encoded apart, so that under every tokenizer exactly the bytes of the
body are predicted, from exactly the bytes of the context.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenary.core.errors import InputError
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import rust_tokenizer
from tokenary.models import LM

Window = tuple[str, str]
BATCH = 4


@dataclass(frozen=True)
class Bits:
    """What predicting some windows took.

    Attributes
    ----------
    bits, n_bytes : ndarray
        (W,) of the body of each window.
    tokens : int
        Of all bodies.
    parts : dict
        Sums over the tokens of one sort, ``{sort: {"tokens", "bytes", "bits"}}``; the sorts are ``new``, ``after new``
        (one that is not new itself) and ``other``.
    """

    bits: np.ndarray
    n_bytes: np.ndarray
    tokens: int
    parts: dict[str, dict[str, float]]

    @property
    def per_byte(self) -> np.ndarray:
        """Bits a byte of each window, (W,)."""
        return self.bits / self.n_bytes

    def part(self, sort: str) -> float:
        """Bits a byte of the tokens of one sort; NaN where there are none."""
        found = self.parts[sort]
        return found["bits"] / found["bytes"] if found["bytes"] else math.nan


def windows(text: str, count: int, context: int = 256, body: int = 768) -> list[Window]:
    """Cut evenly spaced windows out of a text, each part beginning with white space.

    Parameters
    ----------
    text : str
        Long enough that windows do not overlap.
    count : int
        Windows.
    context, body : int
        Characters of both parts, a few more or less.

    Raises
    ------
    InputError
        The text is too short.
    """
    stride = len(text) // max(count, 1)
    if stride < context + body + 200:
        raise InputError(f"a text of {len(text):,} characters is too short for {count} windows of {context + body}")
    found = []
    for number in range(count):
        borders, at = [], number * stride
        for size in (0, context, body):
            at = _space(text, at + size)
            borders.append(at)
        found.append((text[borders[0] : borders[1]], text[borders[1] : borders[2]]))
    return found


def _space(text: str, at: int) -> int:
    """The next white space behind a character that is none."""
    while at < len(text) and not (text[at].isspace() and not text[at - 1 : at].isspace()):
        at += 1
    return at


@torch.inference_mode()
def bits_of(lm: LM, texts: Sequence[Window], new: Collection[int] = ()) -> Bits:
    """Predict the bodies of windows behind their contexts.

    Parameters
    ----------
    lm : LM
        A causal model with its tokenizer; begins each context with the tokens that the tokenizer puts there.
    texts : sequence of (str, str)
        Context and body; see `windows`.
    new : collection of int
        Ids whose losses are summed apart.

    Raises
    ------
    InputError
        The model has no tokenizer, or an empty body.
    """
    if lm.tokenizer is None:
        raise InputError(f"{lm.name} has no tokenizer")
    rows, starts = [], []
    for context, body in texts:
        first = list(lm.tokenizer(context, verbose=False)["input_ids"])
        if first and first[-1] in lm.eos_token_ids:
            first.pop()
        if not body or not first:
            raise InputError("a window needs a context and a body")
        rows.append(first + list(lm.tokenizer(body, add_special_tokens=False, verbose=False)["input_ids"]))
        starts.append(len(first))
    bits, parts = np.zeros(len(rows)), {sort: np.zeros(3) for sort in ("new", "after new", "other")}
    spellings = Vocabulary(rust_tokenizer(lm.tokenizer)).spellings
    for at in range(0, len(rows), BATCH):
        some = rows[at : at + BATCH]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
        for number, row in enumerate(some):
            ids[number, : len(row)] = torch.tensor(row)
        logits = lm.model(ids[:, :-1].to(lm.device)).logits  # padded behind: a causal model does not see it
        for number, row in enumerate(some):
            start, wanted = starts[at + number], torch.tensor(row[starts[at + number] :], device=lm.device)
            scores = logits[number, start - 1 : len(row) - 1].float().log_softmax(-1)
            spent = -scores.gather(-1, wanted[:, None])[:, 0].double().cpu().numpy() / math.log(2)
            bits[at + number] = spent.sum()
            for place, cost in enumerate(spent, start=start):
                token, before = row[place], row[place - 1]
                sort = "new" if token in new else "after new" if before in new else "other"
                parts[sort] += (1, len(spellings[token]), cost)
    names = ("tokens", "bytes", "bits")
    return Bits(
        bits,
        np.array([len(body.encode()) for _, body in texts]),
        sum(len(row) - start for row, start in zip(rows, starts, strict=True)),
        {sort: dict(zip(names, map(float, sums), strict=True)) for sort, sums in parts.items()},
    )
