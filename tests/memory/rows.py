"""Sequences that leave a batch, come twice, and are forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.memory.laws import RAGGED
from tokenary.models.lm import LM


def leave_and_repeat(lm: LM, target: Target, expected: Sequence[Sequence[int]]) -> None:
    """Demand 25 new tokens of each of `RAGGED`, while two of them leave half-way and one goes on twice."""
    rows, texts = list(range(4)), [list(prompt) for prompt in RAGGED]
    with attached(lm.model):
        for row, token in zip(rows, target.prefill(RAGGED).argmax(-1).tolist(), strict=True):
            texts[row].append(token)
        for step in range(1, 25):
            if step == 9:
                rows = [2, 0, 2]
                target.select_rows(rows)
                texts = [list(texts[row]) for row in rows]
            logits = target.score(TokenTree.roots([text[-1] for text in texts]))
            target.commit([[0]] * len(texts))
            for text, token in zip(texts, logits[:, 0].argmax(-1).tolist(), strict=True):
                text.append(token)
    for row, text in zip(rows, texts, strict=True):
        assert text[len(RAGGED[row]) :] == expected[row]


def forget(target: Target) -> None:
    """Demand that nothing is held after a reset."""
    target.cache.reset()
    assert target.nbytes == 0
