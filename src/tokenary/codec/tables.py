"""Functions whose values must be the same on every machine: by tables, or by additions and products alone.

The libm of one machine and that of another differ in last bits. Here `decimal`, which is integer arithmetic, makes the
tables of exp and of the logistic function; cosine and sine are polynomials in IEEE operations.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

_CONTEXT = Context(prec=30)
#: Steps a nat in the tables of `exp_table`.
STEPS = 1024
#: The first entry of `exp_table(24, 30)`: exp(0).
ONE = 1 << 30
_TURN = Decimal("6.28318530717958647692528676655900576839")


@functools.cache
def exp_table(nats: int, bits: int) -> NDArray[np.int32]:
    """Return ``round(2^bits exp(-d / STEPS))`` for d below ``nats * STEPS``; one more entry is 0."""
    values = [int((Decimal(-d) / STEPS).exp(_CONTEXT) * (1 << bits) + Decimal("0.5")) for d in range(nats * STEPS)]
    return np.array([*values, 0], np.int32)


@functools.cache
def logistic_table(nats: int, steps: int) -> NDArray[np.float32]:
    """Return 1 / (1 + exp(-x)) for x from -nats to nats, ``steps`` a nat, (2 * nats * steps + 1,)."""
    half = [_CONTEXT.divide(1, 1 + (Decimal(-d) / steps).exp(_CONTEXT)) for d in range(nats * steps + 1)]
    return np.array([1 - value for value in half[:0:-1]] + half, np.float32)


@functools.cache
def inverse_frequencies(theta: float, dim: int) -> tuple[float, ...]:
    """Return theta^(-2 i / dim) for the dim / 2 rotary frequencies."""
    base = Decimal(theta)
    return tuple(float(_CONTEXT.power(base, Decimal(-2 * i) / dim)) for i in range(dim // 2))


def rotations(theta: float, dim: int, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosine and sine of the rotary angles of some positions, each (count, dim / 2)."""
    angle = np.arange(first, first + count, dtype=np.float64)[:, None] * np.array(inverse_frequencies(theta, dim))
    # 2 pi in two parts, the first of so few bits that its multiples are exact
    coarse = float(int(_TURN * (1 << 24))) / (1 << 24)
    fine = float(_TURN - Decimal(coarse))
    turns = np.rint(angle * float(1 / _TURN))
    x = (angle - turns * coarse) - turns * fine
    square, cos, sin = x * x, np.ones_like(x), np.ones_like(x)
    for k in range(28, 0, -2):  # Horner: cos = 1 - x^2/(1 2) (1 - x^2/(3 4) (...)), sin likewise
        cos = 1.0 - square * cos / float(k * (k - 1))
        sin = 1.0 - square * sin / float(k * (k + 1))
    return cos.astype(np.float32), (x * sin).astype(np.float32)
