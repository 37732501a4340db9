"""Adaptive weighted rejection sampling: the next token under a constraint, and an unbiased estimate of its mass.

Tokens are tested in an order of sampling without replacement, and the first that the constraint accepts is taken: it
is distributed as p restricted to the accepted tokens. The weight estimates Z, the mass of all accepted tokens:

    recursive     Z(x, rest) = q + (1 - q) Z(rest) where x is accepted, (1 - q) Z(rest) where it is rejected,
                  with q = p(x) / (1 - R), R the mass rejected so far; one more test decides Z(rest) after an accepted x
    geometric     (a - 1) / (n - 1), with n draws with replacement up to the a-th accepted one; draws of tokens already
                  known to be rejected are not made but counted, by a geometric random number

Both give E[w 1{x is taken}] = p(x) for every accepted x, which is what a particle filter needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

Accepts = Callable[[int], bool]
Estimator = Literal["auto", "recursive", "geometric"]

#: From this largest probability on the same token would be drawn again and again, and `geometric` varies less.
SWITCH = 2 / 3
_LEFT = 1e-9  # less unseen mass than this is rounding error of the sums
_HEAD = 24  # draws by inversion before the rest is put in order at once
_TAIL = 256


class Draw(NamedTuple):
    """A token and its weight.

    Parameters
    ----------
    token : int
        -1 where no accepted token was found.
    log_weight : float
        Logarithm of the estimated mass of the accepted tokens, in nats; minus infinity where none was found.
    """

    token: int
    log_weight: float


NOTHING = Draw(-1, -math.inf)


def without_replacement(
    probabilities: np.ndarray, stream: np.random.Generator, first: float | None = None
) -> Iterator[int]:
    """Yield all tokens of nonzero probability, in an order of sampling without replacement.

    Constraints mostly accept one of the first few. These are drawn by inversion, repeats left out, at the cost of one
    cumulative sum; only then are all others put in order, by the keys log p - log E with exponential E (Gumbel keys).

    Parameters
    ----------
    probabilities : ndarray
        (V,), float64, of any sum.
    stream : Generator
        Random numbers.
    first : float, optional
        The random number in [0, 1) that the first token is drawn with.
    """
    sums = probabilities.cumsum()
    top = np.searchsorted(sums, sums[-1])  # the last token of nonzero probability
    seen: dict[int, None] = {}
    for _ in range(_HEAD):
        number = stream.random() if first is None else first
        first = None
        token = int(min(np.searchsorted(sums, number * sums[-1], side="right"), top))
        if token not in seen:
            seen[token] = None
            yield token
    rest = probabilities.copy()
    rest[list(seen)] = 0
    left = np.flatnonzero(rest)
    with np.errstate(over="ignore"):  # of denormal probabilities; they come last
        keys = stream.standard_exponential(left.size) / rest[left]
    yield from _ascending(keys, left)


def by_probability(scores: np.ndarray) -> Iterator[int]:
    """Yield all tokens, the highest score (V,) first."""
    yield int(scores.argmax())
    yield from itertools.islice(_ascending(-scores, np.arange(scores.size)), 1, None)


def _ascending(keys: np.ndarray, tokens: np.ndarray) -> Iterator[int]:
    """Yield tokens by ascending key; the first few without sorting all."""
    head = min(_TAIL, keys.size)
    if head < keys.size:
        near = keys <= np.partition(keys, head)[head]
        yield from _sorted(keys[near], tokens[near])
        keys, tokens = keys[~near], tokens[~near]
    yield from _sorted(keys, tokens)


def _sorted(keys: np.ndarray, tokens: np.ndarray) -> list[int]:
    return tokens[np.argsort(keys, kind="stable")].tolist()


def first_accepted(order: Iterator[int], accepts: Accepts, max_rejects: int = 0) -> int:
    """Return the first accepted token of an order, -1 if there is none among the first `max_rejects` (0: of all)."""
    tested = itertools.islice(order, max_rejects) if max_rejects else order
    return next((token for token in tested if accepts(token)), -1)


def recursive(probabilities: np.ndarray, accepts: Accepts, stream: np.random.Generator, max_rejects: int = 0) -> Draw:
    """Draw a token with the recursive estimate of its mass; tests two tokens at least.

    Parameters
    ----------
    probabilities : ndarray
        (V,), float64, of sum 1.
    accepts : callable
        Whether a token may come next.
    stream : Generator
        Random numbers.
    max_rejects : int
        Give up after so many rejected tokens, which makes the weights too small; 0 for no bound.
    """
    order = without_replacement(probabilities, stream)
    last = np.count_nonzero(probabilities) - 1
    rejected, log_mass = 0.0, 0.0
    for rank, token in enumerate(order):
        q = 1.0 if rank == last else min(1.0, probabilities[token] / (1 - rejected))
        if accepts(token):
            following = next(order, -1)
            return Draw(token, log_mass + (0.0 if following < 0 or accepts(following) else math.log(q)))
        rejected += probabilities[token]
        if q == 1 or 1 - rejected < _LEFT or rank + 1 == max_rejects:
            break
        log_mass += math.log1p(-q)
    return NOTHING


def geometric(
    probabilities: np.ndarray,
    accepts: Accepts,
    stream: np.random.Generator,
    max_rejects: int = 0,
    max_accepts: int = 2,
) -> Draw:
    """Draw a token with the negative binomial estimate of its mass; parameters as `recursive`'s.

    No token is tested twice.

    Parameters
    ----------
    probabilities, accepts, stream, max_rejects
        As of `recursive`.
    max_accepts : int
        Accepted draws, at least 2; more of them make the weight vary less.
    """
    remaining = probabilities.copy()
    good: set[int] = set()
    token, accepted, draws, rejects, rejected = -1, 0, 0, 0, 0.0
    while accepted < max_accepts:
        for drawn in without_replacement(remaining, stream):
            draws += int(stream.geometric(1 - rejected)) if rejected else 1
            if drawn in good or accepts(drawn):
                good.add(drawn)
                token = drawn if token < 0 else token
                accepted += 1
                break
            rejects += 1
            rejected += probabilities[drawn]
            remaining[drawn] = 0
            if 1 - rejected < _LEFT or rejects == max_rejects:
                return NOTHING
        else:
            return NOTHING
    return Draw(token, math.log(accepted - 1) - math.log(draws - 1))


def awrs(
    probabilities: np.ndarray,
    accepts: Accepts,
    stream: np.random.Generator,
    estimator: Estimator = "auto",
    max_rejects: int = 0,
) -> Draw:
    """Draw a token under a constraint, with its weight.

    Parameters
    ----------
    probabilities : ndarray
        (V,), float64; where tokens were ruled out beforehand, the sum of the others, which goes into the weight.
    accepts, stream, max_rejects
        As of `recursive`.
    estimator : {"auto", "recursive", "geometric"}
        ``auto`` is geometric where one token has at least 2/3 of the mass.
    """
    mass = probabilities.sum()
    if not mass > 0:
        return NOTHING
    probabilities = probabilities / mass
    if estimator == "auto":
        estimator = "geometric" if probabilities.max() >= SWITCH else "recursive"
    drawn = (geometric if estimator == "geometric" else recursive)(probabilities, accepts, stream, max_rejects)
    return Draw(drawn.token, drawn.log_weight + math.log(mass))
