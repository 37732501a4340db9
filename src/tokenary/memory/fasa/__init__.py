"""FASA (arXiv 2602.03152): tokens are chosen by the few frequencies of each head that rank them like the whole head.

With rotary positions a logit is a sum over pairs of dimensions that turn together (chunks)::

    q . k_s = sum_i a_i[s],   a_i[s] = q[pair i] . k_s[pair i]
    CA[h, i] = |top-K(q . k) and top-K(a_i)| / K          averaged over decoded tokens, once for a model
    I[h]     = the chunks with the highest CA
    read     = top-N of sum over I[h] of a_i[s]           then exact attention, at the original positions

In every head a few chunks rank tokens almost as the whole head does. They are found once, by calibration; then looking
for tokens reads only their dimensions of the keys. The prompt and the first layer attend to everything, and nothing
leaves the cache. The dimensions of the dominant chunks are held a second time, side by side, so that ranking reads
nothing else: for each key head the union of what its query heads want.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.hf.cache import TokenLayer
from tokenary.memory.fasa.calibration import agreement_of
from tokenary.memory.fasa.chunks import Pairs, dominant, pairs_of
from tokenary.memory.read_base import PartialLayer, PartialRead, Seen
from tokenary.memory.read_oracle import highest_logits

CARD = Card(
    slug="fasa",
    cls="FASA",
    room="memory",
    title="FASA: Frequency-aware Sparse Attention",
    summary="reads the tokens that the dominant rotary frequencies of each head rank highest; keeps everything",
    slot="read",
    paper="2602.03152",
    year=2026,
    code="AMAP-ML/FASA-ICLR2026",
    training="none",
    requires=("kv-cache", "rope"),
)

__all__ = ["CARD", "FASA"]


class FASA(PartialRead):
    """Read the tokens that the dominant chunks rank highest.

    Parameters
    ----------
    read : Budget
        Tokens that a query head reads; a share is of what it may see.
    chunks : float
        Share of the chunks of a head that choose, rounded up.
    sets : {"head", "group"}
        Dominant chunks of each query head, or one set for all query heads of a key head, which reads less where
        these want different ones.
    pairs : {"rotation", "adjacent"}
        Chunks of dimensions that turn together, or of neighbours, as the authors' code takes them.
    dense : int
        First layers that read everything.
    calibration : str
        File of agreements (`tokenary.memory.fasa.calibration.write`). By default one that ships, else the agreement
        is measured on what the model writes by itself, which takes some hundred passes.
    """

    def __init__(
        self,
        read: Budget = Budget(tokens=256),  # noqa: B008 (frozen)
        chunks: Annotated[float, Field(gt=0, le=1)] = 0.25,
        sets: Literal["head", "group"] = "head",
        pairs: Pairs = "rotation",
        dense: Annotated[int, Field(ge=0)] = 1,
        calibration: str = "",
    ) -> None:
        super().__init__(read)
        self.chunks, self.sets, self.pairs = chunks, sets, pairs
        self.dense, self.calibration = dense, calibration
        self._dims: list[Tensor] = []  # of each layer, (Hq, 2 * chunks) int64

    def prepare(self, model: PreTrainedModel) -> None:
        """Find the dominant chunks of every head.

        Raises
        ------
        UnsupportedModelError
            If the model has no rotary positions.
        """
        pairs = pairs_of(model, self.pairs)
        agreement = agreement_of(model, self.pairs, self.calibration).near(self.read.tokens)
        text = model.config.get_text_config(decoder=True)
        groups = text.num_attention_heads // text.num_key_value_heads
        number = -int(-self.chunks * len(pairs) // 1)
        chosen = [dominant(layer, number, groups, self.sets == "group") for layer in agreement]
        self._dims = [pairs[chunks].flatten(1) for chunks in chosen]

    def layer(self, index: int) -> FASALayer | None:
        """Return fresh state for one layer; None for the first, which read everything."""
        return None if index < self.dense else FASALayer(self, self._dims[index])


class FASALayer(PartialLayer):
    """The dominant dimensions of all keys of one layer, side by side.

    Parameters
    ----------
    policy : FASA
        Its options.
    dims : Tensor
        Dominant dimensions of each query head, (Hq, 2 C) int64.
    """

    def __init__(self, policy: FASA, dims: Tensor) -> None:
        super().__init__(policy)
        self._wanted = dims
        self._union = torch.empty(0, 0, dtype=torch.long)  # dimensions held of each key head, (Hkv, U)
        self._factor = torch.empty(0, 0)  # 1 where a query head wants one of them, (Hq, U)
        self._copy: Tensor | None = None  # (B, Hkv, capacity, U)
        self._copied: list[tuple[int, int, int]] = []  # of each sequence: slots copied, tokens evicted, and stored

    @property
    def nbytes(self) -> int:
        """Bytes of what is held twice."""
        return 0 if self._copy is None else self._copy.nbytes

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the state of these sequences, in this order."""
        self._copied = [self._copied[row] for row in rows if row < len(self._copied)]
        if self._copy is not None:
            self._copy = self._copy[list(rows)] if rows else None

    def join(self, other: FASALayer, rows: int) -> None:
        """Let the next pass copy what it needs of all sequences anew."""
        self._copy, self._copied = None, []

    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose for every query head, by its dominant dimensions."""
        if not self._union.numel():
            self._union, self._factor = union_of(self._wanted.to(key.device), key.shape[1], key.shape[3], query.dtype)
        heads = query.shape[1]
        dims = self._union.repeat_interleave(heads // key.shape[1], dim=0)  # (Hq, U)
        parts = query.gather(-1, dims[None, :, None].expand(query.shape[0], -1, query.shape[2], -1))
        return highest_logits(parts * self._factor[:, None], self._dominant(layer, key), seen, count)

    def _dominant(self, layer: TokenLayer, key: Tensor) -> Tensor:
        """Return the dominant dimensions of all keys, (B, Hkv, N, U), copying those that came since the last pass."""
        batch, kv_heads, length, _ = key.shape
        union = self._union
        if self._copy is None or self._copy.shape[2] < length:
            grown = key.new_empty(batch, kv_heads, length + max(64, length // 16), union.shape[1])
            if self._copy is not None:
                grown[:, :, : self._copy.shape[2]] = self._copy
            self._copy = grown
        self._copied = self._copied or [(0, 0, 0)] * batch
        for row, held in enumerate(layer.held):
            copied, *moved = self._copied[row]
            now = [layer.committed[row] - held, layer.stored[row]]
            start = copied if moved == now else 0  # tokens were evicted, or stored with fewer bits
            self._fill(row, key, start, held)
            self._fill(row, key, layer.fill, length)
            self._copied[row] = (held, now[0], now[1])
        return self._copy[:, :, :length]

    def _fill(self, row: int, key: Tensor, start: int, stop: int) -> None:
        """Copy the dominant dimensions of some slots of a sequence."""
        assert self._copy is not None
        part = key[row, :, start:stop]
        index = self._union[:, None].expand(-1, part.shape[1], -1)
        self._copy[row, :, start:stop] = part.gather(-1, index)


def union_of(wanted: Tensor, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join what the query heads of a group want.

    Parameters
    ----------
    wanted : Tensor
        Dimensions of each query head, (Hq, C) int64.
    kv_heads : int
        Hkv.
    width : int
        Dimensions of a key, D.
    dtype : torch.dtype
        Of the factors.

    Returns
    -------
    Tensor
        Dimensions of each key head, (Hkv, U) int64; a smaller union is filled up with dimensions that nobody wants.
    Tensor
        1 where a query head wants the dimension, else 0, (Hq, U).
    """
    groups = wanted.view(kv_heads, -1)
    unions = [torch.unique(group) for group in groups]
    size = max(map(len, unions))
    filled = []
    for union in unions:
        others = [dim for dim in range(width) if dim not in set(union.tolist())]
        filled.append(torch.cat([union, union.new_tensor(others[: size - len(union)])]))
    joined = torch.stack(filled)
    dims = joined.repeat_interleave(len(wanted) // kv_heads, dim=0)
    return joined, (dims[:, :, None] == wanted[:, None]).any(-1).to(dtype)
