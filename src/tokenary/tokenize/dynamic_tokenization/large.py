"""Generation with a vocabulary of up to a million tokens: predicted rows, and an index over the output rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from tokenary.core.errors import InputError, OptionError
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.dynamic_tokenization.merging import Merged


class LargeVocabulary:
    """The tokens of a tokenizer, all of them, and those that merges over a corpus added.

    Parameters
    ----------
    tokenizer : TextTokenizer
        The original one.
    merged : Merged
        A corpus after as many merges as tokens are wanted (`merge_batch`).
    """

    def __init__(self, tokenizer: TextTokenizer, merged: Merged) -> None:
        self.tokenizer, self.base = tokenizer, tokenizer.id_limit
        made = (merged.parts(merged.base + i) for i in range(len(merged.pairs)))
        known = dict(tokenizer.id_of)
        self.parts: list[tuple[int, ...]] = []
        for parts in made:
            data = b"".join(map(tokenizer.token_bytes, parts))
            if data not in known:  # two merges may make one string
                known[data] = self.base + len(self.parts)
                self.parts.append(parts)
        self._known, self._trie = known, _build(known)

    def __len__(self) -> int:
        return self.base + len(self.parts)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text by longest-prefix matching, not by merges; special tokens are text.

        Raises
        ------
        InputError
            The vocabulary has no token for a byte of the text: some lack a few control characters.
        """
        data = np.frombuffer((" " * self.tokenizer.adds_space + text).encode(), np.uint8)
        ids = _match(data, *self._trie)
        if (ids < 0).any():
            lacking = next(byte for byte in data.tolist() if bytes([byte]) not in self._known)
            raise InputError(f"{self.tokenizer.name} has no token for byte {lacking:#04x}")
        return ids

    def original(self, ids: Sequence[int]) -> list[int]:
        """Return ids of the original tokenizer that spell the same."""
        return [part for id in ids for part in (self.parts[id - self.base] if id >= self.base else (int(id),))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(self.original(ids))


def _build(known: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay a byte trie out as an open hash of (node, byte), its children, and the token of each node."""
    child: dict[int, int] = {}
    token = [-1]
    for data, id in known.items():
        node = 0
        for byte in data:
            key = node * 256 + byte
            node = child.get(key, 0)
            if not node:
                node = child[key] = len(token)
                token.append(-1)
        token[node] = id
    size = 1 << max(4, (2 * len(child)).bit_length())
    keys, values = np.full(size, -1, np.int64), np.zeros(size, np.int64)
    _fill(np.fromiter(child.keys(), np.int64), np.fromiter(child.values(), np.int64), keys, values)
    return keys, values, np.array(token, np.int64)


@numba.njit(cache=True)
def _slot(key: int, mask: int) -> int:
    return ((key * 0x9E3779B1) >> 7) & mask


@numba.njit(cache=True)
def _fill(given: np.ndarray, children: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    mask = len(keys) - 1
    for i in range(len(given)):
        at = _slot(given[i], mask)
        while keys[at] >= 0:
            at = (at + 1) & mask
        keys[at], values[at] = given[i], children[i]


@numba.njit(cache=True)
def _match(data: np.ndarray, keys: np.ndarray, values: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Longest token at each place; -1 for a byte that no token begins with."""
    found = np.empty(len(data), np.int64)
    mask, size, at = len(keys) - 1, 0, 0
    while at < len(data):
        node, end, best, best_end = 0, at, -1, at + 1
        while end < len(data):
            key = node * 256 + int(data[end])
            slot = _slot(key, mask)
            while keys[slot] >= 0 and keys[slot] != key:
                slot = (slot + 1) & mask
            if keys[slot] < 0:
                break
            node, end = values[slot], end + 1
            if token[node] >= 0:
                best, best_end = token[node], end
        found[size] = best
        size, at = size + 1, best_end
    return found[:size]


class OutputIndex:
    """The output rows of a vocabulary, searched by direction; logits are exact on what is found.

    The directions are clustered into leaves; a query looks at the codes (a byte a number) of those in the leaves that
    point its way, and multiplies with the rows of the best.

    Parameters
    ----------
    rows : Tensor
        (V, D) float.
    leaves : int
        Clusters, the paper's 2,000 for a million rows; 0 multiplies with every row instead.
    searched : int
        Leaves that a query looks at.
    candidates : int
        Rows found for a query.

    Raises
    ------
    OptionError
        More leaves than rows; or any, where ``faiss`` is not installed.
    """

    def __init__(self, rows: Tensor, leaves: int = 2000, searched: int = 250, candidates: int = 200) -> None:
        self.rows, self.candidates = rows.float(), min(candidates, len(rows))
        self._index: Any = None
        if not 0 <= leaves <= len(rows):
            raise OptionError("leaves", leaves, f"0 to {len(rows)}, the number of rows")
        if leaves:
            if not importlib.util.find_spec("faiss"):
                raise OptionError("leaves", leaves, "0 where faiss is not installed: pip install 'tokenary[ann]'")
            import faiss

            unit = torch.nn.functional.normalize(self.rows, dim=-1).cpu().numpy()
            self._index = faiss.index_factory(unit.shape[1], f"IVF{leaves},SQ8", faiss.METRIC_INNER_PRODUCT)
            self._index.cp.min_points_per_centroid = 1
            self._index.train(unit)
            self._index.add(unit)
            self._index.nprobe = min(searched, leaves)

    def search(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids (B, k) and exact logits (B, k) of the candidates of queries (B, D), best first.

        Where the leaves hold fewer than k rows, the rest are ids 0 with a logit of minus infinity.
        """
        queries = hidden_states.float()
        if self._index is None:
            logits, ids = (queries @ self.rows.T).topk(self.candidates)
            return ids, logits
        ids = torch.from_numpy(self._index.search(queries.cpu().numpy(), self.candidates)[1]).to(queries.device)
        logits = torch.einsum("bkd,bd->bk", self.rows[ids.clamp_min(0)], queries).masked_fill(ids < 0, -torch.inf)
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
        return ids.clamp_min(0).gather(-1, order), logits

    def recall(self, hidden_states: Tensor) -> float:
        """Return how often the best row of all is the best one found, for queries (B, D)."""
        best = (hidden_states.float() @ self.rows.T).argmax(-1)
        return float((self.search(hidden_states)[0][:, 0] == best).float().mean())


@torch.inference_mode()
def generate(
    model: Any, input_rows: Tensor, index: OutputIndex, ids: Sequence[int], new: int, stop: frozenset[int] = frozenset()
) -> list[int]:
    """Continue one sequence greedily, every new token chosen among the candidates of the index.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model; its own head is not used.
    input_rows : Tensor
        (V, D) input embeddings of the large vocabulary.
    index : OutputIndex
        Over its output rows.
    ids : sequence of int
        The prompt, in the large vocabulary.
    new : int
        Most tokens.
    stop : frozenset of int
        Tokens that end the text.
    """
    made: list[int] = []
    rows, cache = input_rows[torch.tensor(list(ids))][None], None
    while len(made) < new:
        out = model.base_model(inputs_embeds=rows.to(model.dtype), past_key_values=cache, use_cache=True)
        token = int(index.search(out.last_hidden_state[:, -1])[0][0, 0])
        if token in stop:
            break
        made.append(token)
        rows, cache = input_rows[token][None, None], out.past_key_values
    return made
