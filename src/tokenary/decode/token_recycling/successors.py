"""What came after: the likeliest next tokens behind every recent context, looked up longest context first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SLOTS = 17  # bits: 2^17 slots a table, 5 MB at k = 8
_TOKEN = 20  # bits of a token in a key, so that three fit
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads keys over the slots


class Successors:
    """Ranked next tokens of contexts of 1 to `context` tokens; the last writer wins.

    Contexts of one length share the slots of a table by their hash; an older one that is in the way is forgotten.

    Parameters
    ----------
    k : int
        Most tokens kept for each context.
    context : int
        Longest context, 1 to 3.
    """

    def __init__(self, k: int, context: int) -> None:
        self.k, self.context = k, context
        self.keys = np.full((context, 1 << _SLOTS), -1, np.int64)
        self.ranked = np.full((context, 1 << _SLOTS, k), -1, np.int32)  # -1 behind the last known token

    def write(self, contexts: np.ndarray, ranked: np.ndarray) -> None:
        """Learn what came after some contexts.

        Parameters
        ----------
        contexts : np.ndarray
            Tokens (n, context), the newest last; -1 where a text had not begun yet.
        ranked : np.ndarray
            The likeliest next tokens, (n, k).
        """
        key = np.zeros(len(contexts), np.int64)
        for order in range(self.context):
            tokens = contexts[:, self.context - 1 - order].astype(np.int64)
            key = np.where((tokens >= 0) & (key >= 0), key + (tokens << order * _TOKEN), -1)
            known = key >= 0
            slots = ((key[known].astype(np.uint64) * np.uint64(_GOLDEN)) >> np.uint64(64 - _SLOTS)).astype(np.int64)
            self.keys[order, slots] = key[known]
            self.ranked[order, slots] = ranked[known]

    def lead(self, context: Sequence[int], token: int) -> None:
        """Put a token in front of what came after a context and its shorter ends."""
        for order, key, slot in self._places(context):
            before = self.ranked[order, slot].tolist() if self.keys[order, slot] == key else []
            row = [token, *(other for other in before if other != token)][: self.k]
            self.keys[order, slot] = key
            self.ranked[order, slot] = row + [-1] * (self.k - len(row))

    def find(self, context: Sequence[int]) -> tuple[int, list[int]] | None:
        """Return how many tokens beyond the newest one matched, and the next tokens, likeliest first; or None."""
        found = None
        for order, key, slot in self._places(context):
            if self.keys[order, slot] == key:
                found = order, slot
        if found is None:
            return None
        ranked = self.ranked[found].tolist()
        return found[0], ranked[: ranked.index(-1)] if ranked[-1] < 0 else ranked

    def _places(self, context: Sequence[int]) -> list[tuple[int, int, int]]:
        """Order, key and slot of a context's ends, the shortest first."""
        places, key = [], 0
        for order, token in enumerate(reversed(context[-self.context :])):
            key += token << order * _TOKEN
            places.append((order, key, (key * _GOLDEN & (1 << 64) - 1) >> (64 - _SLOTS)))
        return places
