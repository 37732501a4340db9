"""The arithmetic between logits and the entropy coder, on whole vocabularies. IEEE operations and integers alone."""

from __future__ import annotations

import numpy as np
from numba import njit

#: Classes of a model's probability: from 1/2, 1/8, 1/32, ... on.
LEVELS = 7
#: Weights are whole numbers that sum to about this.
WHOLE = float(1 << 40)


@njit(cache=True, nogil=True)
def exponentials(logits, bias, table, shifted, out):
    """Write exp(logits + bias), up to a factor, as whole numbers (V,); return their sum.

    `table` is `exp_table(nats, 30)`; `shifted` (V,) float32 is scratch space.
    """
    size, last = logits.shape[0], np.int32(table.shape[0] - 1)
    steps = shifted.view(np.int32)
    most = np.int32(-(1 << 30))
    for v in range(size):
        # far below any maximum, a logit may be clipped
        steps[v] = np.int32(np.rint((logits[v] + bias[v]) * np.float32(1024.0)))
        most = max(most, steps[v])
    total = np.int64(0)
    for v in range(size):
        out[v] = table[min(most - steps[v], last)]
        total += out[v]
    return total


@njit(cache=True, nogil=True)
def correct(exps, total, ids, kinds, factors, cells, corrected):
    """Multiply the exponentials of some tokens by learnt factors; return the new sum.

    A token's factor is that of its kind and of the class of its probability: its cell, written to `cells` (n,). The new
    exponentials go to `corrected` (n,) float64; `exps` stays.
    """
    whole = np.float64(total)
    for i in range(ids.shape[0]):
        own = np.float64(exps[ids[i]])
        level, bound = 0, 0.5
        while level < LEVELS - 1 and own < bound * total:
            level, bound = level + 1, bound * 0.25
        cells[i] = kinds[i] * LEVELS + level
        corrected[i] = own * factors[cells[i]]
        whole += corrected[i] - own
    return whole


@njit(cache=True, nogil=True)
def combine(exps, total, share, counts, tokens, base, ids, extra, corrected, out):
    """Write ``share`` of the model's distribution and the rest of the n-grams' as whole numbers, float64 (V,)."""
    model = share * WHOLE / max(total, 1.0)
    order0 = (1.0 - share) * base * WHOLE / tokens
    for v in range(counts.shape[0]):
        out[v] = np.rint(np.float64(exps[v]) * model + (np.float64(counts[v]) + 1.0) * order0)
    for i in range(ids.shape[0]):
        v = ids[i]
        rest = (np.float64(counts[v]) + 1.0) * order0 + (1.0 - share) * extra[i] * WHOLE
        out[v] = np.rint(corrected[i] * model + rest)


@njit(cache=True, nogil=True)
def learn(bias, rate, exps, total, token, ids, corrected, cells, factors, step):
    """One step down the gradient of the log-loss, of the bias and of the factors' logarithms.

    ``bias -= rate (p - onehot)``; a factor is multiplied by ``1 - step (p - onehot)``.
    """
    if rate > 0:
        slope = np.float32(rate / total)
        for v in range(bias.shape[0]):
            bias[v] -= np.float32(exps[v]) * slope
        for i in range(ids.shape[0]):
            bias[ids[i]] -= np.float32((corrected[i] - np.float64(exps[ids[i]])) * (rate / total))
        bias[token] += np.float32(rate)
    if step > 0:
        for i in range(ids.shape[0]):
            miss = corrected[i] / total - (1.0 if ids[i] == token else 0.0)
            factors[cells[i]] = min(max(factors[cells[i]] * (1.0 - step * miss), 1.0 / 64.0), 64.0)
