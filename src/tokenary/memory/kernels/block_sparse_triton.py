"""The kernels of `tokenary.memory.kernels.block_sparse` for a GPU, with the softmax computed online (FlashAttention).

Keys are read where they lie, through the permutation or the list of rows, so that nothing is gathered in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _blocks_kernel(
    query, key, value, order, columns, starts, output,
    n_queries, n_keys, scale, groups,
    q_head, q_row, k_head, k_row, v_head, v_row, o_head, o_row,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr,
):  # fmt: skip
    """One program a block of queries and head."""
    index, head = tl.program_id(0), tl.program_id(1)
    rows = index * BLOCK + tl.arange(0, ROWS)
    there = (tl.arange(0, ROWS) < BLOCK) & (rows < n_queries)
    positions = n_keys - n_queries + rows
    dims, dims_v = tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(
        query + head * q_head + rows[:, None] * q_row + dims[None], mask=there[:, None] & (dims < SIZE)[None], other=0.0
    )
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DV], tl.float32)
    entry = head * tl.num_programs(0) + index
    for at in range(tl.load(starts + entry), tl.load(starts + entry + 1)):
        column = tl.load(columns + at)
        for offset in range(0, BLOCK, TILE):
            inside = offset + tl.arange(0, TILE)
            places = column * BLOCK + inside
            real = (inside < BLOCK) & (places < n_keys)
            slots = tl.load(order + head * n_keys + places, mask=real, other=0)
            k = tl.load(
                key + (head // groups) * k_head + slots[:, None] * k_row + dims[None],
                mask=real[:, None] & (dims < SIZE)[None], other=0.0,
            )  # fmt: skip
            seen = real[None] & (slots[None] <= positions[:, None])
            logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            highest = tl.maximum(most, tl.max(logits, 1))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp(logits - base[:, None])
            shrink = tl.exp(most - base)
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(
                value + (head // groups) * v_head + slots[:, None] * v_row + dims_v[None],
                mask=real[:, None] & (dims_v < SIZE_V)[None], other=0.0,
            )  # fmt: skip
            found = found * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            most = highest
    tl.store(
        output + head * o_head + rows[:, None] * o_row + dims_v[None],
        (found / total[:, None]).to(output.dtype.element_ty),
        mask=there[:, None] & (dims_v < SIZE_V)[None],
    )


@triton.jit
def _rows_kernel(
    query, key, value, slots, real, output,
    n_listed, scale, lists, shared,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    R: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr,
):  # fmt: skip
    """One program a query, for all heads that share its list."""
    token, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // lists, (pair % lists) // shared
    entry = pair * tl.num_programs(0) + token
    rows, dims, dims_v = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(
        query + (entry * R + rows[:, None]) * SIZE + dims[None],
        mask=(rows < R)[:, None] & (dims < SIZE)[None], other=0.0,
    )  # fmt: skip
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DV], tl.float32)
    for offset in range(0, n_listed, TILE):
        places = offset + tl.arange(0, TILE)
        listed = places < n_listed
        read = tl.load(real + entry * n_listed + places, mask=listed, other=0) != 0
        slot = tl.load(slots + entry * n_listed + places, mask=read, other=0)
        k = tl.load(
            key + batch * k_batch + head * k_head + slot[:, None] * k_row + dims[None],
            mask=read[:, None] & (dims < SIZE)[None], other=0.0,
        )  # fmt: skip
        logits = tl.where(read[None], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        highest = tl.maximum(most, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(most - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            value + batch * v_batch + head * v_head + slot[:, None] * v_row + dims_v[None],
            mask=read[:, None] & (dims_v < SIZE_V)[None], other=0.0,
        )  # fmt: skip
        found = found * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = highest
    tl.store(
        output + (entry * R + rows[:, None]) * SIZE_V + dims_v[None],
        (found / total[:, None]).to(output.dtype.element_ty),
        mask=(rows < R)[:, None] & (dims_v < SIZE_V)[None],
    )


def _padded(size: int) -> int:
    """Smallest size that a matrix product of Triton takes."""
    return max(16, triton.next_power_of_2(size))


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float, order: Tensor
) -> Tensor:
    """See `tokenary.memory.kernels.block_sparse.block_sparse_attention`."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    heads, n_queries, size = query.shape
    output = query.new_empty(heads, n_queries, value.shape[-1])
    counts = blocks.sum(-1, dtype=torch.int32).view(-1)
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    columns = blocks.view(-1, blocks.shape[-1]).nonzero()[:, 1].int()
    _blocks_kernel[(blocks.shape[1], heads)](
        query, key, value, order.contiguous(), columns, starts, output,
        n_queries, key.shape[1], scale, heads // key.shape[0],
        *(step for x in (query, key, value, output) for step in x.stride()[:2]),
        BLOCK=block, ROWS=_padded(block), TILE=min(_padded(block), 64), D=_padded(size), DV=_padded(value.shape[-1]),
        SIZE=size, SIZE_V=value.shape[-1],
    )  # fmt: skip
    return output


def row_attention(query: Tensor, key: Tensor, value: Tensor, slots: Tensor, real: Tensor, scale: float) -> Tensor:
    """See `tokenary.memory.kernels.block_sparse.row_attention`; (B, L, W, R, D) to (B, L, W, R, Dv)."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, lists, width, heads, size = query.shape
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    _rows_kernel[(width, batch * lists)](
        query.contiguous(), key, value, slots.contiguous(), real.contiguous(), output,
        slots.shape[-1], scale, lists, lists // key.shape[1],
        *(step for x in (key, value) for step in x.stride()[:3]),
        R=heads, ROWS=_padded(heads), TILE=64, D=_padded(size), DV=_padded(value.shape[-1]),
        SIZE=size, SIZE_V=value.shape[-1],
    )  # fmt: skip
    return output
