"""The kernels against attention written out one query at a time."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tokenary.core.errors import OptionError
from tokenary.memory.kernels.block_sparse import _unmasked, block_sparse_attention, row_attention


def blocks_reference(query, key, value, blocks, block, scale, order):
    """Float64, query by query."""
    heads, n_queries, _ = query.shape
    n_keys, groups = key.shape[1], heads // key.shape[0]
    output = torch.full((heads, n_queries, value.shape[-1]), math.nan, dtype=torch.float64)
    for h in range(heads):
        for i in range(n_queries):
            position = n_keys - n_queries + i
            seen = [int(order[h, p]) for p in range(n_keys) if blocks[h, i // block, p // block]]
            seen = [s for s in seen if s <= position]
            if seen:
                logits = key[h // groups, seen].double() @ query[h, i].double() * scale
                output[h, i] = logits.softmax(0) @ value[h // groups, seen].double()
    return output


def rows_reference(query, key, value, slots, real, scale):
    batch, heads, width, _ = query.shape
    output = torch.full((batch, width, heads, value.shape[-1]), math.nan, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            lists, kv = h * slots.shape[1] // heads, h * key.shape[1] // heads
            for w in range(width):
                seen = slots[b, lists, w][real[b, lists, w]]
                if len(seen):
                    logits = key[b, kv, seen].double() @ query[b, h, w].double() * scale
                    output[b, w, h] = logits.softmax(0) @ value[b, kv, seen].double()
    return output


def block_case(seed, kv_heads, groups, n_queries, n_keys, block, share, size=8, size_v=6, ordered=False):
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * groups
    query = torch.randn(heads, n_queries, size, generator=generator)
    key, value = (torch.randn(kv_heads, n_keys, d, generator=generator) for d in (size, size_v))
    shape = (heads, -(-n_queries // block), -(-n_keys // block))
    blocks = torch.rand(shape, generator=generator) < share
    order = torch.rand(heads, n_keys, generator=generator).argsort(-1)
    if ordered:
        order = torch.arange(n_keys).expand(heads, -1)
    return query, key, value, blocks, block, 0.3, order


def row_case(seed, batch=2, kv_heads=2, groups=3, width=5, n=40, listed=9, lists=2, size=8, size_v=6):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, width, size, generator=generator)
    key, value = (torch.randn(batch, kv_heads, n + 7, d, generator=generator)[:, :, :n] for d in (size, size_v))
    slots = torch.rand(batch, lists, width, n, generator=generator).argsort(-1)[..., :listed]
    real = torch.rand(slots.shape, generator=generator) < 0.6
    return query, key, value, slots, real, 0.3


def near(found, expected):
    """Where a query sees anything."""
    there = expected.isfinite()
    torch.testing.assert_close(found.double()[there], expected[there], rtol=1e-5, atol=1e-5)


BLOCK_CASES = [
    dict(kv_heads=2, groups=2, n_queries=32, n_keys=32, block=8, share=0.5),
    dict(kv_heads=1, groups=3, n_queries=13, n_keys=45, block=8, share=0.4),  # ragged ends, a later piece of a prompt
    dict(kv_heads=2, groups=1, n_queries=21, n_keys=21, block=16, share=0.7, ordered=True),
    dict(kv_heads=1, groups=1, n_queries=1, n_keys=5, block=2, share=0.6),
]


@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_blocks(case):
    case = block_case(3, **case)
    near(block_sparse_attention(*case), blocks_reference(*case))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(0, 30),
       st.integers(1, 12), st.floats(0, 1), st.booleans())  # fmt: skip
def test_blocks_of_any_shape(seed, kv_heads, groups, n_queries, before, block, share, ordered):
    case = block_case(seed, kv_heads, groups, n_queries, before + n_queries, block, share, ordered=ordered)
    near(block_sparse_attention(*case), blocks_reference(*case))


def test_all_blocks_are_causal_attention():
    query, key, value, blocks, block, _, order = block_case(0, 2, 2, 48, 48, 8, 2.0)
    expected = scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=True)[0]
    torch.testing.assert_close(block_sparse_attention(query, key, value, blocks, block, 8**-0.5, order), expected)
    torch.testing.assert_close(block_sparse_attention(query, key, value, blocks, block, 8**-0.5), expected)


def test_what_is_not_chosen_is_not_looked_at():
    query, key, value, blocks, block, scale, order = block_case(1, 1, 2, 40, 40, 8, 0.5)
    blocks[:, :, 0] = False
    order[1] = order[0]  # the heads share their keys
    unread = order[0, :block]
    expected = block_sparse_attention(query, key, value, blocks, block, scale, order)
    key[:, unread], value[:, unread] = math.nan, math.nan
    near(block_sparse_attention(query, key, value, blocks, block, scale, order), expected.double())
    blocks[:, :, 0] = True
    assert block_sparse_attention(query, key, value, blocks, block, scale, order).isnan().any()


def test_only_blocks_behind_the_first_masked_one_are_masked():
    blocks = torch.ones(1, 2, 4, dtype=torch.bool)
    blocks[0, 1, 0] = False
    order = torch.tensor([[1, 0, 3, 2, 6, 5, 4, 7]])
    assert _unmasked(blocks, 2, order, 4).tolist() == [[2, 2]]  # the queries stand at 4 and 5, 6 and 7


def test_half_precision_is_summed_in_float32():
    query, key, value, blocks, block, scale, order = block_case(2, 1, 2, 64, 64, 16, 0.6)
    expected = blocks_reference(*(x.bfloat16() for x in (query, key, value)), blocks, block, scale, order)
    found = block_sparse_attention(*(x.bfloat16() for x in (query, key, value)), blocks, block, scale, order)
    assert found.dtype == torch.bfloat16
    there = expected.isfinite()
    torch.testing.assert_close(found.double()[there], expected[there], rtol=0.03, atol=0.03)


def test_wrong_shapes_are_refused():
    query, key, value, blocks, block, scale, order = block_case(0, 1, 2, 16, 16, 8, 0.5)
    with pytest.raises(OptionError, match="blocks"):
        block_sparse_attention(query, key, value, blocks[:, :1], block, scale, order)
    with pytest.raises(OptionError, match="query"):
        block_sparse_attention(query, key[:, :9], value[:, :9], blocks, block, scale, order)
    query, key, value, slots, real, scale = row_case(0)
    with pytest.raises(OptionError, match="slots"):
        row_attention(query, key, value, slots.repeat(1, 2, 1, 1), real.repeat(1, 2, 1, 1), scale)


@pytest.mark.parametrize("lists", [1, 2, 6])
@pytest.mark.parametrize("width", [1, 5, 70])
def test_rows(lists, width):
    case = row_case(lists, lists=lists, width=width)
    near(row_attention(*case), rows_reference(*case))


# ------------------------------------------------------------------------------------------------ Triton


INTERPRETED = "TRITON_INTERPRET"  # Triton reads it when it is first imported
triton_here = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or os.environ.get(INTERPRETED)),
    reason="needs Triton, and a GPU or its interpreter",
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED in os.environ, reason="the tests below run as they are")
def test_triton_in_its_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "test_triton"]
    done = subprocess.run(command, env={**os.environ, INTERPRETED: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout[-4000:]


def on_device(case):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in case)


TRITON_CASES = [
    dict(kv_heads=1, groups=2, n_queries=32, n_keys=32, block=16, share=0.5, size=16, size_v=16),
    dict(kv_heads=2, groups=2, n_queries=21, n_keys=45, block=8, share=0.5, size=12, size_v=20),  # all sizes padded
    dict(kv_heads=1, groups=1, n_queries=130, n_keys=200, block=96, share=0.7, size=16, size_v=16),  # tiles in blocks
]


@triton_here
@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_triton_blocks(case):
    from tokenary.memory.kernels import block_sparse_triton

    case = block_case(5, **case)
    near(block_sparse_triton.block_sparse_attention(*on_device(case)).cpu(), blocks_reference(*case))


@triton_here
@pytest.mark.parametrize(("lists", "listed"), [(2, 9), (6, 70)])
def test_triton_rows(lists, listed):
    from tokenary.memory.kernels import block_sparse_triton

    query, key, value, slots, real, scale = row_case(7, lists=lists, listed=listed, n=90)
    expected = rows_reference(query, key, value, slots, real, scale)
    queries = query.view(2, lists, -1, 5, 8).transpose(2, 3)
    found = block_sparse_triton.row_attention(*on_device((queries, key, value, slots, real, scale))).cpu()
    near(found.permute(0, 2, 1, 3, 4).reshape(expected.shape), expected)
