"""What a plain control reaches in the time of a reducer: between the budgets at which the control was measured."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenary.core.statistics import Array

#: Controls whose curves over time others are held against, and what they are called.
CONTROLS = {"reduce-random": "random", "reduce-pool": "pooling"}


def in_same_time(seconds: float, times: Sequence[float], rights: Sequence[Array]) -> Array | str:
    """Return how often a control answers each question right when it may take so long, or why that is not known.

    Accuracy and retention are linear in it, so that a difference to it is a difference to the control's curve.

    Parameters
    ----------
    seconds : float
        Of a picture and its question with a reducer, its own choice included.
    times : sequence of float
        The same of the control at each of its budgets, and of the whole model, in any order.
    rights : sequence of (n,) arrays
        How often each question is answered right there.

    Returns
    -------
    (n,) array or str
        The points on both sides of that time, weighed by how near they are; outside of all times ``faster: ...`` or
        ``slower: ...``, and ``not measured: ...`` where there are no two points.
    """
    order = sorted((i for i in range(len(times)) if math.isfinite(times[i])), key=times.__getitem__)
    known = [times[i] for i in order]
    if len(known) < 2:
        return "not measured: the control at several budgets"
    if not known[0] <= seconds <= known[-1]:
        word, end, which = ("faster", known[0], "least") if seconds < known[0] else ("slower", known[-1], "most")
        return f"{word}: {1e3 * seconds:.2f} ms, the control at {which} {1e3 * end:.2f} ms"
    right = min(bisect.bisect_right(known, seconds), len(known) - 1)
    width = known[right] - known[right - 1]
    share = (seconds - known[right - 1]) / width if width else 1.0
    return (1 - share) * rights[order[right - 1]] + share * rights[order[right]]


def over_controls(
    seconds: float,
    curves: Mapping[str, tuple[Sequence[float], Sequence[Array]]],
    over: Callable[[Array], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the differences to each control in the same time, or why one is not known, as plain JSON types.

    Parameters
    ----------
    seconds : float
        As those of `in_same_time`.
    curves : mapping
        By control, times and right answers.
    over : callable
        Returns the difference of the reducer's retention to that of right answers (n,).
    """
    found = {}
    for control, (times, rights) in curves.items():
        other = in_same_time(seconds, times, rights)
        unknown = {"value": None, "low": None, "high": None, "why": other}
        found[control] = unknown if isinstance(other, str) else {**over(other), "why": None}
    return found


def told(found: Mapping[str, Any]) -> str:
    """Return a difference of retentions as text, in points: with its interval, or in a word why it is not known."""
    if found["value"] is None:
        return str(found["why"] or "–").partition(":")[0]
    between = "" if found["low"] is None else f" ({100 * found['low']:+.0f} to {100 * found['high']:+.0f})"
    return f"{100 * found['value']:+.0f}{between}"
