"""Every way to write a token as two, and the random walk that takes some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numba
import numpy as np
import torch

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.core.seeding import substream
from tokenary.core.spelling import is_byte
from tokenary.core.token_map import Segment
from tokenary.tokenize.backend import as_text_tokenizer


@dataclass(frozen=True)
class SplitTable:
    """Every way to write a token as two, by id; special and added tokens have none.

    Attributes
    ----------
    starts : ndarray
        (V + 1,) int64: the cuts of token t are ``left[starts[t]:starts[t + 1]]`` and the same of `right`.
    left, right : ndarray
        (cuts,) int32.
    """

    starts: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Cuts of every token, (V,)."""
        return np.diff(self.starts)

    @classmethod
    def of(cls, tokenizer: Any) -> SplitTable:
        """Build the table of a tokenizer: one look-up for every byte of the vocabulary.

        Byte-level vocabularies are cut between any two bytes. Where single bytes are a way out (``<0x0A>``), a cut
        inside a character would need them, and their decoder judges neighbouring bytes together: it would no longer be
        certain that the text stays the same. There tokens are cut between characters only.

        Raises
        ------
        UnsupportedModelError
            A vocabulary whose tokens do not join to the text (WordPiece).
        """
        tokenizer = as_text_tokenizer(tokenizer)
        if tokenizer.algorithm not in ("BPE", "Unigram") or tokenizer.config["model"].get("continuing_subword_prefix"):
            raise UnsupportedModelError(f"{tokenizer.name}: the tokens of {tokenizer.algorithm} do not simply join")
        whole = tokenizer.alphabet == "byte-level"
        ids = {
            data: i
            for data, i in tokenizer.id_of.items()
            if i != tokenizer.unk_id and (whole or not is_byte(tokenizer.piece(i)))
        }
        counts = np.zeros(tokenizer.id_limit + 1, np.int64)
        left: list[int] = []
        right: list[int] = []
        for data, i in sorted(ids.items(), key=itemgetter(1)):
            before = len(left)
            for at in range(1, len(data)):
                head = ids.get(data[:at])
                if head is not None and (tail := ids.get(data[at:])) is not None:
                    left.append(head)
                    right.append(tail)
            counts[i + 1] = len(left) - before
        return cls(counts.cumsum(), np.array(left, np.int32), np.array(right, np.int32))


@dataclass(frozen=True)
class Expanded:
    """A sequence with some tokens split.

    Attributes
    ----------
    ids : ndarray
        (M,) int32.
    origin : ndarray
        (M,) int64, the token of the input that each comes from; ascending.
    """

    ids: np.ndarray
    origin: np.ndarray

    @cached_property
    def token_map(self) -> Segment:
        """The map (N, M) that pools the pieces of every input token."""
        return Segment(torch.from_numpy(self.origin), int(self.origin[-1]) + 1 if len(self.origin) else 0)


def expand(
    ids: Sequence[int] | np.ndarray,
    table: SplitTable,
    p: float = 0.1,
    seed: int = 0,
    document: int | str = 0,
    protected: np.ndarray | None = None,
    limit: int | None = None,
) -> Expanded:
    """Split random tokens; a pure function of its arguments.

    Parameters
    ----------
    ids : sequence of int
        (N,) tokens.
    table : SplitTable
        Of their tokenizer.
    p : float
        Attempts a token; also above 1.
    seed, document : int, int or str
        Name the random draws.
    protected : ndarray, optional
        (N,) bool, tokens that stay whole. An attempt at one is wasted.
    limit : int, optional
        Most tokens that are split.
    """
    tokens = np.ascontiguousarray(ids, np.int32)
    if tokens.ndim != 1:
        raise InputError(f"ids of shape {tokens.shape}: expand takes one sequence")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(table.starts) - 1:
        raise InputError(f"ids from {tokens.min()} to {tokens.max()}: the tokenizer has {len(table.starts) - 1}")
    attempts = int(len(tokens) * p)
    draws = substream(seed, "stochastok", document).random((attempts, 2))
    blocked = np.zeros(len(tokens), np.bool_) if protected is None else np.ascontiguousarray(protected, np.bool_)
    most = attempts if limit is None else min(attempts, limit)
    return Expanded(*_expand(tokens, blocked, table.starts, table.left, table.right, draws, most))


@numba.njit(cache=True)
def _expand(
    tokens: np.ndarray,
    blocked: np.ndarray,
    starts: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    draws: np.ndarray,
    most: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes are in the order of their making; `after` gives that of the text."""
    length = len(tokens)
    node = np.empty(length + most, np.int32)
    origin = np.empty(length + most, np.int64)
    after = np.empty(length + most, np.int64)
    node[:length] = tokens
    for i in range(length):
        origin[i], after[i] = i, i + 1
    after[length - 1 if length else 0 :] = -1
    size = length
    for attempt in range(len(draws)):
        if size - length == most:
            break
        at = min(int(draws[attempt, 0] * size), size - 1)
        first = starts[node[at]]
        cuts = starts[node[at] + 1] - first
        if cuts == 0 or blocked[origin[at]]:
            continue
        cut = first + min(int(draws[attempt, 1] * cuts), cuts - 1)
        node[at], node[size] = left[cut], right[cut]
        origin[size], after[size], after[at] = origin[at], after[at], size
        size += 1
    ids, source = np.empty(size, np.int32), np.empty(size, np.int64)
    at = 0
    for i in range(size):
        ids[i], source[i] = node[at], origin[at]
        at = after[at]
    return ids, source
