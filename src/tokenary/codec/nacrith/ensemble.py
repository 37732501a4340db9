"""The online ensemble: language model with a bias head, n-grams, and the weights between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenary.codec.base import Ensemble
from tokenary.codec.nacrith.mixing import LEVELS, combine, correct, exponentials, learn
from tokenary.codec.nacrith.ngram import Guess, NGrams
from tokenary.codec.tables import exp_table

_FLOOR = 1e-8
_LEAST = 2.0**-40


@dataclass(frozen=True)
class Settings:
    """The options of `Nacrith` that its ensemble reads; see there."""

    order: int = 4
    contexts: int = 500_000
    head: bool = True
    rate: float = 0.1
    factors: float = 0.1
    mixer: str = "context"
    warm_up: int = 100
    skip: float = 1.5


class OnlineEnsemble(Ensemble):
    """State of one block: counts, bias and weights are shared by its lanes, which take turns in a fixed order.

    Parameters
    ----------
    vocab_size : int
        V.
    lanes : int
        Texts that are coded side by side.
    settings : Settings
        Which parts take part.
    """

    def __init__(self, vocab_size: int, lanes: int, settings: Settings) -> None:
        self.settings, self.coded = settings, 0
        self.ngrams = NGrams(vocab_size, settings.order, settings.contexts)
        self.bias: NDArray[np.float32] = np.zeros(vocab_size, np.float32)
        self.mix: dict[tuple[int, int], tuple[float, float]] = {}
        self.context: list[list[int]] = [[] for _ in range(lanes)]
        self.guesses: list[Guess | None] = [None] * lanes
        self._exps: NDArray[np.int32] = np.zeros(vocab_size, np.int32)
        self._shifted: NDArray[np.float32] = np.empty(vocab_size, np.float32)
        self._weights: NDArray[np.float64] = np.empty(vocab_size, np.float64)
        self._total = 0.0
        self.factors: NDArray[np.float64] = np.ones(12 * LEVELS * max(settings.order, 1))

    @property
    def _warm(self) -> bool:
        return self.coded >= self.settings.warm_up

    def plan(self, lanes: Sequence[int]) -> list[bool]:
        """Say for each lane whether its next token needs the language model: not where the n-grams are sure."""
        needed = []
        for lane in lanes:
            uses = self.settings.mixer != "off" and self._warm
            guess = self.ngrams.guess(self.context[lane]) if uses else None
            self.guesses[lane] = guess
            sure = guess is not None and self.settings.skip > 0 and guess.base < 0.5
            needed.append(not (sure and self.ngrams.entropy(guess) < self.settings.skip))  # type: ignore[arg-type]
        return needed

    def weights(self, lane: int, logits: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Return whole numbers (V,) in proportion to the probabilities of the lane's next token."""
        guess = self.guesses[lane]
        found, n = guess or Guess(), 0 if guess is None else len(guess.extra)
        self._ids = np.fromiter(found.extra, np.int64, n)
        self._cells, self._corrected = np.zeros(n, np.int64), np.zeros(n)
        self._total, share = 0.0, 0.0
        if logits is not None:
            total = exponentials(logits, self.bias, exp_table(24, 30), self._shifted, self._exps)
            kinds = np.fromiter(found.kinds.values(), np.int64, n)
            self._total = correct(self._exps, total, self._ids, kinds, self.factors, self._cells, self._corrected)
            share = 1.0 if guess is None else self._share(guess)[0]
        combine(
            self._exps,
            self._total,
            share,
            self.ngrams.counts,
            float(self.ngrams.total),
            found.base,
            self._ids,
            np.fromiter(found.extra.values(), np.float64, n),
            self._corrected,
            self._weights,
        )
        return self._weights

    def update(self, lane: int, token: int) -> None:
        """Learn the token that came; call it right after `weights` of the same lane."""
        guess, settings = self.guesses[lane], self.settings
        if self._total:
            if guess is not None:
                at = np.flatnonzero(self._ids == token)
                own = float(self._corrected[at[0]]) if len(at) else float(self._exps[token])
                self._reweigh(guess, own / self._total, self.ngrams.probability(guess, token))
            learn(
                self.bias,
                settings.rate if settings.head else 0.0,
                self._exps,
                self._total,
                token,
                self._ids,
                self._corrected,
                self._cells,
                self.factors,
                settings.factors if settings.mixer == "context" else 0.0,
            )
        if settings.mixer != "off":
            self.ngrams.update(self.context[lane], token)
            self.context[lane] = [*self.context[lane], token][-max(settings.order, 1) :]
        self.coded += 1

    def _share(self, guess: Guess) -> tuple[float, float]:
        return self.mix.get(self._set(guess), (0.85, 0.15))

    def _set(self, guess: Guess) -> tuple[int, int]:
        """Which set of weights: one for all, or one for each order and confidence of the n-grams."""
        if self.settings.mixer == "paper":
            return (0, 0)
        top = max(guess.extra.values(), default=0.0)
        return (guess.order, min(int(top * 8.0), 7))

    def _reweigh(self, guess: Guess, model: float, ngrams: float) -> None:
        """Multiply each weight by the root of its probability (a step of 0.5 in log weights); contexts also forget."""
        first, second = self._share(guess)
        first *= math.sqrt(max(model, _FLOOR))
        second *= math.sqrt(max(ngrams, _FLOOR))
        share = first / (first + second)
        if self.settings.mixer == "context":
            share = 0.98 * share + 0.02 * 0.85
        share = min(max(share, _LEAST), 1.0 - _LEAST)
        self.mix[self._set(guess)] = (share, 1.0 - share)
