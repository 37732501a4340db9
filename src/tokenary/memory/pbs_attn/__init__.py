"""PBS-Attn: Sparser Block-Sparse Attention via Token Permutation (Wang et al. 2025, arXiv 2510.21270).

A prompt is read with attention to few blocks of keys. Attention does not care in which order keys come, so they are
first sorted inside segments: keys that matter then share blocks, and fewer blocks hold as much of the attention.

    g[j]   = mean over the newest queries of softmax_j(q . k_j / sqrt(D))         importance, no causal mask
    pi     = inside every complete segment, the keys by falling g                 a permutation a query head
    a[i]   = softmax_j(pool(Q_i) . pool(K_pi_j) / sqrt(D))                        j: blocks in segments before that of i
    read   = the fewest blocks j with sum of a[i, j] >= mass,
             every block of the own segment, and the block that holds key 0       masked token by token, pi(k) <= q

Queries keep their order, so that nothing has to be undone; the cache keeps the order of the text, and passes that read
no prompt attend to everything. Blocks in which no key is visible are left out, in every order of the keys alike.

What is exact: with ``mass=1`` all of it. A query never attends to a later token, to padding or to a neighbour in the
batch. But *which* earlier blocks a query reads is chosen for a whole pass, by queries behind it too: a text depends on
where its prompt ends and on how it is cut into passes. Decoding chooses nothing, and drafts change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.seeding import substream
from tokenary.core.token_map import Permute
from tokenary.hf.cache import TokenLayer
from tokenary.memory.base import ReadLayer, ReadPolicy
from tokenary.memory.kernels.block_sparse import block_sparse_attention
from tokenary.memory.pbs_attn.blocks import Pool, causal_pairs, choose_blocks, importance, pooled, sorted_inside

CARD = Card(
    slug="pbs-attn",
    cls="PBSAttn",
    room="memory",
    title="Sparser Block-Sparse Attention via Token Permutation",
    summary="reads prompts with attention to few blocks of keys, sorted so that those that matter share blocks",
    slot="read",
    paper="2510.21270",
    year=2025,
    code="xinghaow99/pbs-attn",
    requires=("kv-cache",),
)


class PBSAttn(ReadPolicy):
    """Read prompts by blocks of permuted keys.

    Parameters
    ----------
    mass : float
        Share of the estimated attention to earlier segments that the blocks read must hold; 1 reads everything.
    block : int
        Queries, and keys, of a block.
    segment : int
        Keys that are sorted among themselves, a multiple of `block`. A prompt up to that long is read as always.
    queries : int
        The newest queries of a pass, which judge the keys.
    query_pool, key_pool : {"mean", "max"}
        What stands for a block.
    sink : bool
        Whether the block that holds the first token is always read.
    order : {"importance", "none", "random"}
        How keys are sorted inside a segment: by importance, as in the paper, not at all, or anyhow.
    seed : int
        Of the random order.

    Raises
    ------
    OptionError
        If segments do not consist of whole blocks.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {"mass": 0.4, "block": 4, "segment": 8, "queries": 4}

    def __init__(
        self,
        mass: Annotated[float, Field(gt=0, le=1)] = 0.9,
        block: Annotated[int, Field(ge=1)] = 128,
        segment: Annotated[int, Field(ge=1)] = 256,
        queries: Annotated[int, Field(ge=1)] = 128,
        query_pool: Pool = "mean",
        key_pool: Pool = "mean",
        sink: bool = True,
        order: Literal["importance", "none", "random"] = "importance",
        seed: int = 0,
    ) -> None:
        if segment % block:
            raise OptionError("segment", segment, f"a multiple of block={block}")
        self.mass, self.block, self.segment, self.queries = mass, block, segment, queries
        self.query_pool: Pool = query_pool
        self.key_pool: Pool = key_pool
        self.sink, self.order, self.seed = sink, order, seed

    def layer(self, index: int) -> PBSLayer:
        """Return fresh state for one layer."""
        return PBSLayer(self, index)

    def arrange(self, query: Tensor, key: Tensor, scale: float, layer: int = 0) -> Permute:
        """Sort the keys (Hkv, N, D) of one sequence for its newest queries (H, Q, D): a map (H, N, N)."""
        heads, n_keys = query.shape[0], key.shape[1]
        complete = n_keys // self.segment * self.segment
        if self.order == "importance":
            scores = importance(query[:, -self.queries :], key[:, :complete], scale)
        elif self.order == "random":
            stream = substream(self.seed, "pbs-attn", layer)  # by token, then head: one that comes changes none before
            scores = torch.from_numpy(stream.random((complete, heads), dtype=np.float32).T).to(query.device)
        else:
            scores = torch.zeros(heads, complete, device=query.device)
        return sorted_inside(scores, self.segment, n_keys)

    def choose(self, query: Tensor, key: Tensor, order: Permute, scale: float) -> Tensor:
        """Choose the blocks of permuted keys that each block of queries reads, (H, ceil(Q / b), ceil(N / b)) bool."""
        groups = query.shape[0] // key.shape[0]
        rows = (pooled(order[head] @ key[head // groups], self.block, self.key_pool) for head in range(len(query)))
        keys, queries = torch.stack(list(rows)), pooled(query, self.block, self.query_pool)
        scores = torch.matmul(queries, keys.transpose(1, 2)) * scale
        return choose_blocks(scores, order, query.shape[1], self.block, self.segment, self.mass, self.sink)


class PBSLayer(ReadLayer):
    """Counts what was read in one layer; nothing else is remembered."""

    def __init__(self, policy: PBSAttn, index: int) -> None:
        self.policy, self.index = policy, index
        self.computed = self.causal = 0  # pairs of blocks, all heads together

    @property
    def density(self) -> float:
        """Pairs of blocks that were computed, of those that causal attention has; 1 before any were."""
        return self.computed / self.causal if self.causal else 1.0

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend sparsely where a piece of a prompt is read; the ordinary way elsewhere."""
        info = layer.shared[0]
        if not (info.prompt or layer.fill == 0) or info.ancestors is not None or info.visible is not None:
            return None
        if key.shape[2] <= self.policy.segment:
            return None
        valid = layer.valid if layer.valid is not None or info.positions is None else info.positions >= 0
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        for row, held in enumerate(layer.held):
            new = torch.arange(query.shape[2], device=query.device) if valid is None else valid[row].nonzero()[:, 0]
            if len(new):
                slots = torch.cat([torch.arange(held, device=new.device), layer.fill + new])
                keys, values = (states[row].index_select(1, slots) for states in (key, value))
                output[row, new] = self.read(query[row].index_select(1, new), keys, values, scale).transpose(0, 1)
        return output

    def read(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend for one sequence: queries (H, Q, D), the newest of the keys (Hkv, N, D), to (H, Q, Dv)."""
        policy = self.policy
        order = policy.arrange(query, key, scale, self.index)
        blocks = policy.choose(query, key, order, scale)
        self.computed += int(blocks.sum())
        self.causal += len(blocks) * causal_pairs(query.shape[1], key.shape[1], policy.block)
        return block_sparse_attention(query, key, value, blocks, policy.block, scale, order.index)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Forget the counts when no sequence is left."""
        if not rows:
            self.computed = self.causal = 0

    def join(self, other: PBSLayer, rows: int) -> None:
        """Add the counts of other prompts."""
        self.computed += other.computed
        self.causal += other.causal
