"""Block-sparse and selected-row attention.

On the CPU keys are gathered row by row, whatever order they are wanted in, and met in one matrix product: gathering
costs a tenth of the product with a block of queries, and loops compiled by numba are several times slower than both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.core.errors import OptionError

GATHERED = 64  # queries whose listed rows are gathered at once


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float, order: Tensor | None = None
) -> Tensor:
    """Attend causally to chosen blocks of keys.

    The queries are the newest of the keys: query i stands at position ``N - Q + i`` and sees keys of that position and
    before, in the blocks chosen for its block.

    Parameters
    ----------
    query : Tensor
        (H, Q, D).
    key, value : Tensor
        (Hkv, N, D) and (Hkv, N, Dv); H is a multiple of Hkv.
    blocks : Tensor
        Which block of keys each block of queries reads, (H, ceil(Q / block), ceil(N / block)) bool.
    block : int
        Queries a block, and keys a block.
    scale : float
        Factor on the logits.
    order : Tensor, optional
        (H, N) int64, a permutation a head: place p of the blocked keys holds the key of position ``order[h, p]``.

    Returns
    -------
    Tensor
        (H, Q, Dv), in the order of the queries; undefined where a query sees no key.

    Raises
    ------
    OptionError
        If shapes do not fit.
    """
    heads, n_queries, _ = query.shape
    expected = (heads, -(-n_queries // block), -(-key.shape[1] // block))
    if tuple(blocks.shape) != expected:
        raise OptionError("blocks", tuple(blocks.shape), f"{expected}, blocks of {block}")
    if n_queries > key.shape[1] or heads % key.shape[0]:
        raise OptionError("query", tuple(query.shape), f"heads and tokens that fit keys of shape {tuple(key.shape)}")
    if order is None:
        order = torch.arange(key.shape[1], device=key.device).expand(heads, -1)
    if query.is_cuda:
        from tokenary.memory.kernels import block_sparse_triton

        return block_sparse_triton.block_sparse_attention(query, key, value, blocks, block, scale, order)
    return _block_sparse_cpu(query, key, value, blocks, block, scale, order)


def _block_sparse_cpu(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float, order: Tensor
) -> Tensor:
    """See `block_sparse_attention`."""
    heads, n_queries, _ = query.shape
    n_keys, groups = key.shape[1], heads // key.shape[0]
    output = query.new_empty(heads, n_queries, value.shape[-1])
    padded = pad(order, (0, -n_keys % block)).view(heads, -1, block)
    tail = blocks[:, :, -1].tolist() if n_keys % block else None  # who reads the last block, which is not full
    chosen = iter(blocks.nonzero()[:, 2].split(blocks.sum(-1).view(-1).tolist()))
    unmasked = _unmasked(blocks, block, order, n_queries).tolist()
    positions = (torch.arange(n_queries) + n_keys - n_queries)[:, None].split(block)
    for head in range(heads):
        keys, values, ordered = key[head // groups], value[head // groups], padded[head]
        parts = zip((query[head] * scale).split(block), output[head].split(block), positions, strict=True)
        for index, (queries, found, position) in enumerate(parts):
            rows = ordered.index_select(0, next(chosen)).view(-1)
            if tail is not None and tail[head][index]:
                rows = rows[: len(rows) - -n_keys % block]
            logits = torch.mm(queries, keys.index_select(0, rows).T)
            later = unmasked[head][index] * block  # blocks before this column lie wholly in the past
            if later < len(rows):
                logits[:, later:].masked_fill_(rows[later:] > position, -math.inf)
            weights = logits.softmax(-1, dtype=torch.float32).to(values.dtype)
            torch.mm(weights, values.index_select(0, rows), out=found)
    return output


def _unmasked(blocks: Tensor, block: int, order: Tensor, n_queries: int) -> Tensor:
    """How many of the first chosen blocks need no mask, since all their keys are seen, (H, nq) int64."""
    heads, n_keys = order.shape
    padded = pad(order, (0, -n_keys % block), value=-1)
    newest = padded.view(heads, -1, block).amax(-1)  # (H, nk)
    first = n_keys - n_queries + torch.arange(0, n_queries, block, device=order.device)
    masked = blocks & (newest[:, None] > first[:, None])
    return (blocks & (masked.cumsum(-1) == 0)).sum(-1)


def row_attention(query: Tensor, key: Tensor, value: Tensor, slots: Tensor, real: Tensor, scale: float) -> Tensor:
    """Attend to listed rows of a cache.

    Parameters
    ----------
    query : Tensor
        (B, Hq, W, D).
    key, value : Tensor
        (B, Hkv, N, D) and (B, Hkv, N, Dv).
    slots, real : Tensor
        (B, L, W, M) int64 and bool: the rows each query reads, and which entries of the list count. L is Hq, Hkv or
        1: a list for each query head, each key head, or one for all.
    scale : float
        Factor on the logits.

    Returns
    -------
    Tensor
        (B, W, Hq, Dv); undefined where a query reads nothing.

    Raises
    ------
    OptionError
        If L is none of these.
    """
    lists = slots.shape[1]
    if lists not in (1, key.shape[1], query.shape[1]):
        raise OptionError("slots", tuple(slots.shape), f"1, {key.shape[1]} or {query.shape[1]} lists")
    if lists == 1:
        slots, real = (x.expand(-1, key.shape[1], -1, -1) for x in (slots, real))
    batch, heads, width, size = query.shape
    queries = query.view(batch, slots.shape[1], -1, width, size).transpose(2, 3)  # (B, L, W, R, D), R heads a list
    if query.is_cuda:
        from tokenary.memory.kernels import block_sparse_triton

        output = block_sparse_triton.row_attention(queries, key, value, slots, real, scale)
    else:
        output = _rows_cpu(queries, key, value, slots, real, scale)
    return output.permute(0, 2, 1, 3, 4).reshape(batch, width, heads, -1)


def _rows_cpu(query: Tensor, key: Tensor, value: Tensor, slots: Tensor, real: Tensor, scale: float) -> Tensor:
    """See `row_attention`; queries are (B, L, W, R, D), and the output (B, L, W, R, Dv)."""
    batch, lists, width, _, size = query.shape
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    shared = lists // key.shape[1]
    for row in range(batch):
        for number in range(lists):
            keys, values = key[row, number // shared], value[row, number // shared]
            for start in range(0, width, GATHERED):
                part = slice(start, start + GATHERED)
                at = slots[row, number, part]  # (w, M)
                taken = keys.index_select(0, at.reshape(-1)).view(*at.shape, size)
                logits = torch.bmm(query[row, number, part] * scale, taken.transpose(1, 2))  # (w, R, M)
                weights = logits.masked_fill_(~real[row, number, part, None], -math.inf)
                weights = weights.softmax(-1, dtype=torch.float32).to(values.dtype)
                taken = values.index_select(0, at.reshape(-1)).view(*at.shape, -1)
                output[row, number, part] = torch.bmm(weights, taken)
    return output
