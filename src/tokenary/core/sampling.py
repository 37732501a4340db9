"""How a token is chosen from logits: greedily, or by inverting the cumulative distribution at a named random number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenary.core.errors import OptionError
from tokenary.core.seeding import substream


class Chooser(Protocol):
    """Chooses the next token of some sequences."""

    @property
    def greedy(self) -> bool:
        """Whether the choice is the argmax of the untouched logits, so that all nodes may be chosen at once."""

    def __call__(self, logits: Tensor, rows: Sequence[int], histories: Sequence[Sequence[int]]) -> list[int]:
        """Choose from logits (n, V) for the sequences `rows`, whose tokens so far are `histories`."""


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0, else sampling.

    The random number of a token depends on the seed, the row and the position alone. The same seed therefore gives
    the same text whether tokens come one or several a pass, alone or in a batch.

    Parameters
    ----------
    temperature : float
        At least 0.
    top_k : int
        Sample among the k likeliest tokens; 0 for all.
    top_p : float
        Sample among the likeliest tokens that together hold this probability, in (0, 1].
    seed : int
        Any integer.
    first_row : int
        Number of the first sequence, which names its random numbers: batches of one call draw different ones.

    Raises
    ------
    OptionError
        If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    first_row: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise OptionError("temperature", self.temperature, "a number at least 0")
        if self.top_k < 0:
            raise OptionError("top_k", self.top_k, "an integer at least 0")
        if not 0 < self.top_p <= 1:
            raise OptionError("top_p", self.top_p, "a number above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether every choice is the argmax."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what is sampled from: float32 probabilities (n, V) of logits (n, V)."""
        scaled = logits.float() / self.temperature
        if self.top_k:
            least = scaled.topk(min(self.top_k, scaled.shape[-1])).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        probabilities = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
            probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities

    def __call__(self, logits: Tensor, rows: Sequence[int], histories: Sequence[Sequence[int]]) -> list[int]:
        """Choose from logits (n, V)."""
        if self.greedy:
            return logits.max(-1).indices.tolist()
        numbers = [
            substream(self.seed, "sample", self.first_row + row, len(history)).random()
            for row, history in zip(rows, histories, strict=True)
        ]
        return invert(self.probabilities(logits), numbers)


def invert(probabilities: Tensor, numbers: Sequence[float]) -> list[int]:
    """Sample by inverting the cumulative distribution.

    Parameters
    ----------
    probabilities : Tensor
        (n, V).
    numbers : sequence of float
        n uniform numbers in [0, 1).

    Returns
    -------
    list of int
        The first index at which the cumulative sum exceeds the number; never one of probability zero.
    """
    sums = probabilities.double().cumsum(-1)
    points = torch.tensor(list(numbers), dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True).clamp(max=sums.shape[-1] - 1)[:, 0].tolist()
