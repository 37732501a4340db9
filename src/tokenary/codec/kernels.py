"""Compiled loops of the integer transformer.

Without ``fastmath`` the compiler may reorder sums of integers, and nothing else: what is not integer is IEEE arithmetic
in the order written here.
"""

from __future__ import annotations

import numpy as np
from numba import njit

#: Largest quantized activation: two int8 parts, 128 * 127 + 0.
LEVELS = 16256
#: Largest quantized query, int16: 64 * 127 * 32767 < 2^31.
QUERY_LEVELS = 32767
#: Steps a nat in the table of exp.
STEPS = 1024
#: Attention weights are whole numbers, first up to WHOLE, then int16 that sum to about MASS: 127 * MASS < 2^31.
WHOLE = 262144.0
MASS = 16.0e6


@njit(cache=True, nogil=True)
def _peak(x):
    """Largest magnitude; by the bits, which order floats as integers do, so that the compiler may vectorize."""
    bits, most = x.view(np.int32), np.int32(0)
    for k in range(bits.shape[0]):
        most = max(most, bits[k] & np.int32(0x7FFFFFFF))
    found = np.empty(1, np.int32)
    found[0] = most
    return found.view(np.float32)[0]


@njit(cache=True, nogil=True)
def quantize_rows(x, planes, scales):
    """Write rows (R, K) as int8 pairs, high parts in rows 0..R-1 of `planes` (2R, K), low parts below; and scales."""
    rows, width = x.shape
    for r in range(rows):
        most = _peak(x[r])
        scales[r] = most / np.float32(LEVELS)
        factor = np.float32(LEVELS) / most if most > 0 else np.float32(0.0)
        for k in range(width):
            a = np.int32(np.rint(x[r, k] * factor))
            high = (a + 64) >> 7
            planes[r, k] = high
            planes[rows + r, k] = a - (high << 7)


@njit(cache=True, nogil=True)
def rms_norm(x, gain, eps, out):
    """Root-mean-square norm of rows (R, K); the sum runs in eight fixed strands."""
    rows, width = x.shape
    strands = np.zeros(8, np.float64)
    for r in range(rows):
        strands[:] = 0.0
        for k in range(width):
            strands[k & 7] += np.float64(x[r, k]) * np.float64(x[r, k])
        total = 0.0
        for s in range(8):
            total += strands[s]
        factor = np.float32(1.0 / np.sqrt(total / width + eps))
        for k in range(width):
            out[r, k] = x[r, k] * factor * gain[k]


@njit(cache=True, nogil=True)
def dequantize(y, scales, weights, out, add):
    """Join the products of high and low parts (2R, N) to values (R, N); add them to `out`, or replace it."""
    rows, width = out.shape
    for r in range(rows):
        for n in range(width):
            value = (y[r, n] * np.float32(128.0) + y[rows + r, n]) * (scales[r] * weights[n])
            out[r, n] = out[r, n] + value if add else value


@njit(cache=True, nogil=True)
def gated(y, scales, weights, table, reach, steps, out):
    """silu(gate) * up from the products of both, (2R, 2N), into (R, N)."""
    rows, width = out.shape
    for r in range(rows):
        for n in range(width):
            gate = (y[r, n] * np.float32(128.0) + y[rows + r, n]) * (scales[r] * weights[n])
            m = width + n
            up = (y[r, m] * np.float32(128.0) + y[rows + r, m]) * (scales[r] * weights[m])
            at = np.int32(np.rint(min(max(gate, -reach), reach) * steps)) + np.int32(reach * steps)
            out[r, n] = gate * table[at] * up


@njit(cache=True, nogil=True, inline="always")
def _rotate(head, cos, sin, out):
    half = cos.shape[0]
    for i in range(half):
        out[i] = head[i] * cos[i] - head[half + i] * sin[i]
        out[half + i] = head[half + i] * cos[i] + head[i] * sin[i]


@njit(cache=True, nogil=True)
def _round_into(x, levels, out):
    most = _peak(x)
    factor = np.float32(levels) / most if most > 0 else np.float32(0.0)
    for i in range(x.shape[0]):
        out[i] = np.rint(x[i] * factor)
    return most / np.float32(levels)


@njit(cache=True, nogil=True)
def _dots(query, keys, out, at):
    """Write the products of queries (G, D) with keys (n, D) to out[:, at : at + n]."""
    groups, dim = query.shape
    for j in range(keys.shape[0]):
        for g in range(groups):
            total = np.int32(0)
            for i in range(dim):
                total += np.int32(query[g, i]) * np.int32(keys[j, i])
            out[g, at + j] = total


@njit(cache=True, nogil=True)
def _dots64(query, keys, out, at):
    """`_dots` with D = 64, which a compiler that knows it unrolls."""
    for j in range(keys.shape[0]):
        for g in range(query.shape[0]):
            total = np.int32(0)
            for i in range(64):
                total += np.int32(query[g, i]) * np.int32(keys[j, i])
            out[g, at + j] = total


@njit(cache=True, nogil=True)
def _weigh(mass, at, values, first, n, out):
    """Add values[:, first : first + n] (D, n), weighted by mass[:, at : at + n] (G, n), to out (G, D)."""
    for g in range(mass.shape[0]):
        for i in range(values.shape[0]):
            weights, column = mass[g, at : at + n], values[i, first : first + n]
            total = np.int32(0)
            for j in range(n):
                total += np.int32(weights[j]) * np.int32(column[j])
            out[g, i] += total


@njit(cache=True, nogil=True)
def _masses(dots, key_scales, value_scales, factor, table, work, mass):
    """Turn one head's products (n,) into whole attention weights; return the factor of the sum weighted by them.

    exp by table; the scale of each value is folded into its weight. `work` (n,) is scratch space.
    """
    n, last = dots.shape[0], np.int32(table.shape[0] - 1)
    unit, most = factor * np.float32(STEPS), np.int32(-(1 << 30))
    for j in range(n):
        dots[j] = np.int32(np.rint(np.float32(dots[j]) * (key_scales[j] * unit)))
        most = max(most, dots[j])
    total = np.int64(0)
    for j in range(n):
        e = table[min(most - dots[j], last)]
        total += e
        work[j] = np.float32(e) * value_scales[j]
    highest = _peak(work)
    if highest == 0:
        return np.float32(0.0)
    up, whole = np.float32(WHOLE) / highest, np.int64(0)
    for j in range(n):
        dots[j] = np.int32(np.rint(work[j] * up))
        whole += dots[j]
    down = np.float32(min(32767.0 / WHOLE, MASS / np.float64(whole)))
    for j in range(n):
        mass[j] = np.int16(np.rint(np.float32(dots[j]) * down))
    return np.float32(np.float64(highest) / (WHOLE * np.float64(down) * np.float64(total)))


@njit(cache=True, nogil=True)
def attend(
    qkv,
    lanes,
    positions,
    starts,
    keys,
    key_scales,
    values,
    value_scales,
    sinks,
    sink_values,
    cos,
    sin,
    scaling,
    table,
    out,
):
    """Write keys and values of R new tokens to the cache of their lanes, and attend from each.

    Parameters
    ----------
    qkv : float32 array, (R, (H + 2 Hkv) D)
        Projections of the new tokens, the rows of a lane in the order of their positions.
    lanes, positions, starts : int64 arrays, (R,)
        Where each row stands, and the first position that it sees.
    keys, values : int8 arrays, (lanes, Hkv, slots, D) and (lanes, Hkv, D, slots)
        Rings: position p lies in slot p % slots. Changed in place.
    key_scales, value_scales : float32 arrays, (lanes, Hkv, slots)
        Of each key and value. Changed in place.
    sinks : float32 array, (lanes, Hkv, S, D)
        Keys of a lane's first S tokens, not rotated. A row that no longer sees them in the ring sees them right before
        its first position: it turns them to there. Changed in place.
    sink_values : float32 array, (lanes, Hkv, S, D)
        Their values. Changed in place.
    cos, sin : float32 arrays, (positions, D / 2)
        Rotations.
    scaling : float
        Of the products.
    table : int32 array
        Of exp, in steps of 1 / 1024 nat.
    out : float32 array, (R, H D)
        Receives the attended values.
    """
    rows = qkv.shape[0]
    kv_heads, slots, dim = keys.shape[1], keys.shape[2], keys.shape[3]
    heads = out.shape[1] // dim
    group = heads // kv_heads
    turned, whole = np.empty(dim, np.float32), np.empty(dim, np.float32)
    query, factors = np.empty((group, dim), np.int16), np.empty(group, np.float32)
    held = sinks.shape[2]
    dots, mass = np.empty((group, held + slots), np.int32), np.empty((group, held + slots), np.int16)
    scales, work = np.empty((2, held + slots), np.float32), np.empty(held + slots, np.float32)
    first_keys, first_values = np.empty((held, dim), np.int8), np.empty((dim, held), np.int8)
    total = np.empty((group, dim), np.int32)
    for r in range(rows):
        lane, position = lanes[r], positions[r]
        slot = position % slots
        for h in range(kv_heads):
            at = (heads + h) * dim
            if position < held:
                sinks[lane, h, position] = qkv[r, at : at + dim]
                sink_values[lane, h, position] = qkv[r, at + kv_heads * dim : at + (kv_heads + 1) * dim]
            _rotate(qkv[r, at : at + dim], cos[position], sin[position], turned)
            key_scales[lane, h, slot] = _round_into(turned, 127, whole)
            for i in range(dim):
                keys[lane, h, slot, i] = np.int8(whole[i])
            at += kv_heads * dim
            value_scales[lane, h, slot] = _round_into(qkv[r, at : at + dim], 127, whole)
            for i in range(dim):
                values[lane, h, i, slot] = np.int8(whole[i])
    for r in range(rows):
        lane, position, start = lanes[r], positions[r], starts[r]
        n, first = position + 1 - start, start % slots
        head = min(n, slots - first)  # the ring wraps at most once
        tail = n - head
        aside = held if start > 0 else 0  # sinks that are not in the ring
        for h in range(kv_heads):
            for g in range(group):
                at = (h * group + g) * dim
                _rotate(qkv[r, at : at + dim], cos[position], sin[position], turned)
                factors[g] = _round_into(turned, QUERY_LEVELS, whole) * scaling
                for i in range(dim):
                    query[g, i] = np.int16(whole[i])
            for j in range(aside):
                place = start - held + j
                _rotate(sinks[lane, h, j], cos[place], sin[place], turned)
                scales[0, j] = _round_into(turned, 127, whole)
                for i in range(dim):
                    first_keys[j, i] = np.int8(whole[i])
                scales[1, j] = _round_into(sink_values[lane, h, j], 127, whole)
                for i in range(dim):
                    first_values[i, j] = np.int8(whole[i])
            _dots(query, first_keys[:aside], dots, 0)
            if dim == 64:
                _dots64(query, keys[lane, h, first : first + head], dots, aside)
                _dots64(query, keys[lane, h, :tail], dots, aside + head)
            else:
                _dots(query, keys[lane, h, first : first + head], dots, aside)
                _dots(query, keys[lane, h, :tail], dots, aside + head)
            middle, end = aside + head, aside + n
            scales[0, aside:middle] = key_scales[lane, h, first : first + head]
            scales[0, middle:end] = key_scales[lane, h, :tail]
            scales[1, aside:middle] = value_scales[lane, h, first : first + head]
            scales[1, middle:end] = value_scales[lane, h, :tail]
            for g in range(group):
                factors[g] = _masses(
                    dots[g, :end], scales[0, :end], scales[1, :end], factors[g], table, work[:end], mass[g]
                )
            total[:] = 0
            _weigh(mass, 0, first_values, 0, aside, total)
            _weigh(mass, aside, values[lane, h], first, head, total)
            _weigh(mass, middle, values[lane, h], 0, tail, total)
            for g in range(group):
                at = (h * group + g) * dim
                for i in range(dim):
                    out[r, at + i] = np.float32(total[g, i]) * factors[g]
