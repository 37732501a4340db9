"""How many nodes to draft: from the measured cost of a pass at each width and the acceptance seen so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

#: Rows (batch times width) at which the cost of a pass is measured; between them it is interpolated.
_GRID = (1, 4, 8, 16, 24, 32, 48, 64, 96)
_REPEATS = 3
_PRIOR_WEIGHT = 4.0  # passes that the prior counts for
_CHOICES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 19, 23, 27, 31, 39, 47, 63, 80)


class DraftWidth:
    """Chooses the draft size that yields the most tokens a second.

    Expected tokens of a pass with n nodes: 1 + the sum of p_i, where p_i is the share of passes in which the i-th
    node was accepted. Old evidence fades, so that a change of text is noticed and wider drafts are tried again.

    Parameters
    ----------
    most : int
        Largest number of nodes.
    fixed : int, optional
        Always this many.
    judged : bool
        The proposer knows the chance of each node of a draft, and asks `cut` how many of them pay.
    """

    def __init__(self, most: int, fixed: int | None = None, judged: bool = False) -> None:
        self.most, self.fixed, self.judged = most, fixed, judged
        self._hits, self._trials = np.zeros(most), np.zeros(most)
        self._cost: np.ndarray | None = None
        self._measured: list[float] = []

    @property
    def ready(self) -> bool:
        """Whether it can choose: the number is fixed, or the cost of a pass is known."""
        return self.fixed is not None or self._cost is not None

    @property
    def acceptance(self) -> np.ndarray:
        """Estimated share of passes in which the node of each rank is accepted, (most,).

        What was seen of a rank is mixed with what the rank before it suggests: a share that falls as 1 / rank, from
        an optimistic 0.6. So the first passes are wide, and teach, and a width that pays suggests a larger one.
        """
        estimates, expected = [], 0.6
        for rank, (hits, trials) in enumerate(zip(self._hits.tolist(), self._trials.tolist(), strict=True), start=1):
            estimates.append((hits + _PRIOR_WEIGHT * expected) / (trials + _PRIOR_WEIGHT))
            expected = estimates[-1] * rank / (rank + 1)
        return np.array(estimates)

    def measure(self, seconds: Callable[[int], float]) -> None:
        """Time one more pass, ``seconds(rows)``, until it is `ready`; of three over as many rows the best counts."""
        if not self.ready:
            self._measured.append(seconds(_GRID[len(self._measured) // _REPEATS]))
            if len(self._measured) == len(_GRID) * _REPEATS:
                self._cost = np.array(self._measured).reshape(-1, _REPEATS).min(1)

    def cost(self, rows: np.ndarray | int) -> np.ndarray:
        """Seconds of a pass over `rows` nodes in all."""
        assert self._cost is not None
        slope = max(0.0, (self._cost[-1] - self._cost[-2]) / (_GRID[-1] - _GRID[-2]))
        return np.interp(rows, _GRID, self._cost) + slope * np.maximum(0, np.asarray(rows) - _GRID[-1])

    def choose(self, batch: int) -> int:
        """Return how many nodes to draft for each of `batch` sequences."""
        if self.fixed is not None or self.judged:
            return self.fixed or self.most
        gained = np.concatenate([[0.0], np.cumsum(self.acceptance)])
        choices = [n for n in _CHOICES if n <= self.most]
        return max(choices, key=lambda n: float((1 + gained[n]) / self.cost(batch * (n + 1))))

    def cut(self, chances: Sequence[Sequence[float]]) -> int:
        """How many nodes of each tree yield the most tokens a second.

        Parameters
        ----------
        chances : sequence of sequence of float
            For each tree of the batch, the chance of every node, in the order in which they would be drafted.
        """
        longest = max(map(len, chances))
        if self.fixed is not None or self._cost is None:
            return longest
        gained = np.zeros(longest + 1)
        for row in chances:
            gained[1 : len(row) + 1] += row
        tokens = len(chances) + np.cumsum(gained)
        return int(np.argmax(tokens / self.cost(len(chances) * np.arange(1, longest + 2))))

    def record(self, seconds: float, width: int, sizes: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Learn from a pass: its time, and which of the nodes of each tree were accepted."""
        if self.fixed is not None:
            return
        self._hits *= 0.98
        self._trials *= 0.98
        share = 1 / len(sizes)
        for size, path in zip(sizes, paths, strict=True):
            self._trials[: size - 1] += share
            self._hits[np.asarray(path[1:], int) - 1] += share
        if self._cost is not None:
            rows = width * len(sizes)
            ratio = seconds / float(self.cost(rows))
            if 0.3 < ratio < 3:  # a pass that was interrupted by something else teaches nothing
                low = max(i for i, at in enumerate(_GRID) if at <= rows)
                for index in range(low, min(low + 2, len(_GRID))):
                    self._cost[index] *= 1 + 0.1 * (ratio - 1)
                self._cost = np.array(list(itertools.accumulate(self._cost, max)))
