"""Thinking too long: answers that are forced after a part of a chain of thought, beside the one at its end.

An answer that was right early and is wrong at the end was lost by thinking on; some are lost and some are won by chance
alone, so both shares are told. A context that is reduced may change how long a model thinks, and what it then answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenary.models.lm import LM
from tokenary.probe.token_reduction_position.effects import Array, Parts
from tokenary.probe.token_reduction_position.passages import Riddle
from tokenary.probe.token_reduction_position.text import Way, forward, greedy

Yes = NDArray[np.bool_]
#: Of a chain, where answers are forced: before it, on the way, at its end.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def cuts(length: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Return how many of `length` tokens of a chain stand before each cut, halves rounded up."""
    return [int(share * length + 0.5) for share in shares]


def early_and_late(right: Yes) -> tuple[Yes, Yes]:
    """Say which answers were lost and which were won on the way.

    Parameters
    ----------
    right : (..., cuts) bool array
        Whether the answer is right at each cut, of `SHARES`.

    Returns
    -------
    lost, won : (...) bool arrays
        Right at some cut on the way and wrong at the end; wrong at some cut on the way and right at the end.
    """
    table = np.asarray(right, dtype=bool)
    early, late = table[..., 1:-1], table[..., -1]
    return early.any(-1) & ~late, ~early.all(-1) & late


@dataclass(frozen=True)
class Thoughts:
    """What one arm thought, by seed and question.

    Attributes
    ----------
    tokens : (seeds, n) array
        Tokens of each chain.
    right : (seeds, n, cuts) bool array
        Whether the answer that is forced at each cut is right.
    """

    tokens: Array
    right: Yes

    def parts(self) -> dict[str, Parts]:
        """Return the figures as parts of effects."""
        lost, won = early_and_late(self.right)
        late = self.right[..., -1].astype(np.float64)
        at = {f"right_at_{100 * share:.0f}%": Parts.mean(self.right[..., i]) for i, share in enumerate(SHARES[:-1])}
        return {
            "answer_right": Parts.mean(late),
            "tokens": Parts.mean(self.tokens),
            "right_per_100_tokens": Parts(100 * late, np.asarray(self.tokens, dtype=np.float64)),
            "right_early_wrong_late": Parts.mean(lost),
            "wrong_early_right_late": Parts.mean(won),
            **at,
        }


def ends_chain(lm: LM) -> Callable[[int], bool]:
    """Return what says whether a token ends a chain of thought: the end of the text, or of the line."""
    ends = set(lm.eos_token_ids)
    return lambda token: token in ends or "\n" in lm.decode([token])


@torch.inference_mode()
def think(
    model: Any, way: Way, number: int, riddle: Riddle, ends: Callable[[int], bool], limit: int
) -> tuple[list[int], list[int]]:
    """Think greedily about a question, and answer it at every cut of that one chain.

    The prompt is read once; the cache is cut back to each part of the chain, and the answer is forced behind it.

    Parameters
    ----------
    model, way, number, riddle
        Who reads what in which way.
    ends : callable
        Whether a token ends the chain; it is no part of it.
    limit : int
        Most tokens of the chain, at least 1.

    Returns
    -------
    list of int
        The chain.
    list of int
        The value that is told at each cut of `SHARES`.
    """
    ids, positions = way.prompt(number, riddle.context, riddle.question)
    told: list[int] = []
    with way.around(model, number, len(ids) - len(riddle.question)):
        chain, past = greedy(model, ids, positions, limit, ends)
        held = min(len(chain), limit - 1)  # the last token of a chain that is cut off was not read
        for cut in reversed(cuts(len(chain))):
            keep = min(cut, held)
            past.crop(keep - held)
            new, start = [*chain[keep:cut], *riddle.forced], positions[-1] + 1 + keep
            logits, past = forward(model, new, range(start, start + len(new)), past, 1)
            told.append(int(logits[0, -1, list(riddle.values)].argmax()))
            held = keep + len(new)
    return chain, told[::-1]


def thoughts(lm: LM, ways: Iterable[Way], riddles: Sequence[Riddle], limit: int) -> Thoughts:
    """Think about every question in one way, or one a seed."""
    tokens, right, ends = [], [], ends_chain(lm)
    for way in ways:
        found = [think(lm.model, way, number, riddle, ends, limit) for number, riddle in enumerate(riddles)]
        tokens.append([len(chain) for chain, _ in found])
        pairs = zip(found, riddles, strict=True)
        right.append([[each == riddle.stated for each in told] for (_, told), riddle in pairs])
    return Thoughts(np.array(tokens, dtype=np.float64), np.array(right, dtype=bool))
